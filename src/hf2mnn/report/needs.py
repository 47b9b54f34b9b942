"""What a run will need of this machine, said before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from hf2mnn.config import Config
from hf2mnn.footprint import CONVERSION, STAGES, run_bytes
from hf2mnn.report.console import console_to, readable_size
from hf2mnn.source.memory import available_memory
from hf2mnn.source.size import model_size


def print_needs(config: Config, results: Path, file: IO[str] | None = None) -> None:
    """Disk and memory for each model that has no results yet, and what there is; a run that may not fit is told so."""
    console, total = console_to(file, 100), 0
    free, memory = shutil.disk_usage(Path.cwd()).free, available_memory()
    for name, described in config.models.items():
        if (results / name / "summary.csv").exists():
            continue
        source = described.source
        size = model_size(source.path, source.pin)
        bits = [config.bits_of(variant) for variant in config.variants_of(name)]
        wanted = run_bytes(size.weights, size.embedding, bits, fetched=source.path is None)
        total += sum(wanted.values())
        about = f"{size.weights / 1e9:.2g} billion weights" if size.known else "a size not known yet, taken for a 2B"
        parts = ", ".join(f"{readable_size(value)} {what}" for what, value in wanted.items())
        console.print(f"{name}: {about}; disk: {parts}", soft_wrap=True, highlight=False)
        convert, all_of_it = (
            max(STAGES[stage].memory_mb(size.weights) for stage in stages) * 1e6 for stages in (CONVERSION, STAGES)
        )
        peaks = f"{readable_size(convert)} to convert, up to {readable_size(all_of_it)} to evaluate"
        console.print(f"{name}: memory: {peaks}, of {readable_size(memory)} free", soft_wrap=True, highlight=False)
    if total > free:
        said = f"this run may write {readable_size(total)}, and the disk has {readable_size(free)} free"
        console.print(f"[bold]{said}[/bold]", soft_wrap=True, highlight=False)
