"""Messages at the start and at the end of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from hf2mnn.checkpoint.size import model_size
from hf2mnn.config.schema import Config
from hf2mnn.figures import readable_size
from hf2mnn.machine.footprint import run_bytes
from hf2mnn.machine.hardware import available_memory
from hf2mnn.report.console import console_to, print_stages, print_table
from hf2mnn.report.table import SUMMARY, read_table
from hf2mnn.report.versions import PAGE
from hf2mnn.stages import ORDER, conversion_memory_mb, stage_named


def print_needs(config: Config, results: Path, file: IO[str] | None = None) -> None:
    """Print required disk and memory of each model without results, and a warning if the disk may be too small."""
    console, total = console_to(file, 100), 0
    free, memory = shutil.disk_usage(Path.cwd()).free, available_memory()
    stages = [stage_named(name) for name in ORDER]
    footprints = [footprint for stage in stages for footprint in (stage.footprint, *stage.exceptions.values())]
    for name, model in config.models.items():
        if (results / name / "summary.csv").exists():
            continue
        size = model_size(model.source.path, model.source.pin)
        bits = [config.bits_of(variant) for variant in config.variants_of(name)]
        disk = run_bytes(size.weights, size.embedding, bits, fetched=model.source.path is None)
        total += sum(disk.values())
        weights = f"{size.weights / 1e9:.2g} billion weights"
        weights = weights if size.known else "size not known yet, assumed to be a 2B"
        parts = ", ".join(f"{readable_size(value)} {purpose}" for purpose, value in disk.items())
        console.print(f"{name}: {weights}; disk: {parts}", soft_wrap=True)
        convert = conversion_memory_mb(size.weights) * 1e6
        peak = max(footprint.memory_mb(size.weights) for footprint in footprints) * 1e6
        peaks = f"{readable_size(convert)} to convert, up to {readable_size(peak)} to evaluate"
        console.print(f"{name}: memory: {peaks}; {readable_size(memory)} available", soft_wrap=True)
    if total > free:
        warning = f"this run may write {readable_size(total)}, and the disk has {readable_size(free)} free"
        console.print(warning, style="bold", soft_wrap=True)


def print_outcome(results: Path, prefix: str | None = None) -> None:
    """Print the comparison, if there is one, and the resources of the stages; only the location in object storage."""
    if prefix:
        print(f"results: {prefix}/{results}")
        return
    if (results / SUMMARY).exists():
        print_summary(results / SUMMARY)
    if any(results.glob("*/checkpoint/manifest.json")):
        print_stages(results, ORDER)


def print_summary(path: Path) -> None:
    """Print the comparison in a summary.csv, and the paths of the pages beside it."""
    frame = read_table(path)
    print_table(frame)
    for model in frame["model"].unique():
        page = path.parent / model / "report.html"
        if page.exists():
            print(f"report: {page}")
        if (changes := page.with_name(PAGE)).exists():
            print(f"\n{changes.read_text(encoding='utf-8')}")
