"""What each stage took, as a person reads it at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

from rich.table import Table

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import NAME, Manifest, stages_below
from hf2mnn.core.progress import duration
from hf2mnn.report.console import console_to, readable_size


def made_below(model: Path, stages: Sequence[str]) -> dict[str, Manifest]:
    """Manifests by the stage's folder in that of the model, in the order of `stages`.

    Raises:
        ManifestError: a file of that name is no manifest.
    """
    loaded = {folder.relative_to(model).as_posix(): Manifest.load(folder) for folder in stages_below(model)}
    order = {stage: place for place, stage in enumerate(stages)}
    return dict(sorted(loaded.items(), key=lambda made: (order.get(made[1].stage, len(order)), made[0])))


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)


def _cpu(seconds: float) -> str:
    # A manifest of an older version has none.
    return _time(seconds) if seconds else "-"


def print_stages(results: Path, stages: Sequence[str], file: IO[str] | None = None) -> None:
    """One table a model: each stage that has finished, in whichever run.

    Raises:
        ManifestError: there are none, or one cannot be read.
    """
    models = sorted(path.parent.parent for path in results.glob(f"*/checkpoint/{NAME}"))
    if not models:
        raise ManifestError(f"no stage has finished in {results}: give the folder that holds a folder for each model")
    console = console_to(file, 100)
    for model in models:
        made = made_below(model, stages)
        took, sizes = list(made.values()), [sum(f["size"] for f in m.outputs.values()) for m in made.values()]
        title = f"{model.name}: what each stage took when it was made"
        table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
        table.add_column("stage", "together", overflow="fold")
        for head, foot in (
            ("time", _time(sum(m.seconds for m in took))),
            ("CPU time", _cpu(sum(m.cpu_seconds for m in took))),
            ("peak memory", readable_size(max(m.peak_rss_mb for m in took) * 1e6)),
            ("files", readable_size(sum(sizes))),
        ):
            table.add_column(head, foot, justify="right", no_wrap=True)
        for (place, manifest), size in zip(made.items(), sizes, strict=True):
            cells = [_time(manifest.seconds), _cpu(manifest.cpu_seconds), readable_size(manifest.peak_rss_mb * 1e6)]
            table.add_row(place, *cells, readable_size(size))
        console.print(table)
    console.print(
        "together: the sum of all, and of memory the largest. Stages that run at the same time take less\n"
        "time than their sum, and more memory than the largest. Files that bundles share on disk are\n"
        "counted in each.",
        style="dim",
        markup=False,
    )
