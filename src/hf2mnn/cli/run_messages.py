"""Messages at the start and at the end of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

from hf2mnn.checkpoint.size import model_size
from hf2mnn.config.schema import Config
from hf2mnn.machine.footprint import run_bytes
from hf2mnn.machine.memory import available_memory
from hf2mnn.report.changes import PAGE
from hf2mnn.report.console import console_to, print_table, readable_size
from hf2mnn.report.resources import print_stages
from hf2mnn.report.table import SUMMARY, read_table
from hf2mnn.stages import ORDER, conversion_memory_mb, stage_named


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
        convert = conversion_memory_mb(size.weights) * 1e6
        declared = [stage_named(stage) for stage in ORDER]
        footprints = [made for stage in declared for made in (stage.footprint, *stage.exceptions.values())]
        all_of_it = max(footprint.memory_mb(size.weights) for footprint in footprints) * 1e6
        peaks = f"{readable_size(convert)} to convert, up to {readable_size(all_of_it)} to evaluate"
        console.print(f"{name}: memory: {peaks}, of {readable_size(memory)} free", soft_wrap=True, highlight=False)
    if total > free:
        said = f"this run may write {readable_size(total)}, and the disk has {readable_size(free)} free"
        console.print(f"[bold]{said}[/bold]", soft_wrap=True, highlight=False)


def print_outcome(results: Path, prefix: str | None = None) -> None:
    """Print the comparison, if there is one, and the resources of the stages.

    Args:
        results: Folder with a folder for each model.
        prefix: Object storage that has the results; then its location is printed.
    """
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
