"""Table of the time, memory and disk space of each stage, for the end of a run and `hf2mnn resources`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.table import Table

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import NAME, Manifest, stage_folders
from hf2mnn.core.progress import duration
from hf2mnn.figures import readable_size
from hf2mnn.report.console import console_to

HEADS = ("time", "CPU time", "peak memory", "files")


def manifests_of(model: Path, stages: Sequence[str]) -> dict[str, Manifest]:
    """Return the manifests below results/<model> by path, in the order of `stages`.

    Raises:
        ManifestError: A manifest cannot be read.
    """
    loaded = {folder.relative_to(model).as_posix(): Manifest.load(folder) for folder in stage_folders(model)}
    order = {stage: position for position, stage in enumerate(stages)}
    return dict(sorted(loaded.items(), key=lambda entry: (order.get(entry[1].stage, len(order)), entry[0])))


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)


def _cells(seconds: float, cpu_seconds: float, peak_mb: float, size: float) -> list[str]:
    # Manifests of older versions have no CPU time.
    cpu = _time(cpu_seconds) if cpu_seconds else "-"
    return [_time(seconds), cpu, readable_size(peak_mb * 1e6), readable_size(size)]


def print_stages(results: Path, stages: Sequence[str], file: IO[str] | None = None) -> None:
    """Print one table for each model with the stages that have finished.

    Args:
        results: Folder that holds a folder for each model.
        stages: Names of the stages in the order of the pipeline.
        file: Output; stdout by default.

    Raises:
        ManifestError: No stage has finished, or a manifest cannot be read.
    """
    models = sorted(path.parent.parent for path in results.glob(f"*/checkpoint/{NAME}"))
    if not models:
        raise ManifestError(f"no stage has finished in {results}: give the folder that holds a folder for each model")
    console = console_to(file, 100)
    for model in models:
        rows = {
            path: (m.seconds, m.cpu_seconds, m.peak_rss_mb, sum(output["size"] for output in m.outputs.values()))
            for path, m in manifests_of(model, stages).items()
        }
        seconds, cpu_seconds, peaks, sizes = zip(*rows.values(), strict=True)
        total = _cells(sum(seconds), sum(cpu_seconds), max(peaks), sum(sizes))
        title = f"{model.name}: resources of each stage"
        table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
        table.add_column("stage", "total", overflow="fold")
        for head, foot in zip(HEADS, total, strict=True):
            table.add_column(head, foot, justify="right", no_wrap=True)
        for path, row in rows.items():
            table.add_row(path, *_cells(*row))
        console.print(table)
    console.print(
        "total: sum of all stages; for memory, the maximum. Stages that run at the same time take less time\n"
        "than the sum and more memory than the maximum. Files that bundles share on disk are counted once\n"
        "for each bundle.",
        style="dim",
        markup=False,
    )
