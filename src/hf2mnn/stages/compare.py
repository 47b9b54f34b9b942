"""compare: differences between two versions of a model, in accuracy, speed and layers.

Reads the finished results of both versions; may time their bundles against each other.
Writes changes.csv and changes.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.stage import Stage
from hf2mnn.machine.footprint import Footprint

if TYPE_CHECKING:
    from hf2mnn.report.evidence import Evidence
    from hf2mnn.report.versions import Versions

STAGE = Stage("compare", tools=("MNN", "numpy"), footprint=Footprint(1500, 4.2, 60, 240))


def run(
    before: Path,
    after: Path,
    variants: list[str] | None = None,
    benchmark: bool = False,
    toolchain: Path | None = None,
    out: Path | None = None,
) -> Versions:
    """Compare results/<model> of two versions.

    Raises:
        Hf2mnnError: A version has no report, no such variant, or no benchmark.
        ManifestError: A stage folder differs from its manifest.
    """
    from hf2mnn.report.versions import compare_versions, read_report, write_changes

    both, tables = zip(*(read_report(folder, variants) for folder in (before, after)), strict=True)
    python = toolchain.resolve() / "bin" / "python" if toolchain else None
    speeds = _time_both(*both, python) if benchmark else None
    versions = compare_versions(*both, speeds=speeds)
    if out:
        write_changes(out, versions, tables, speeds or ({}, {}))
    return versions


def _time_both(before: Evidence, after: Evidence, python: Path | None) -> list[dict[str, Any]]:
    """Time the bundles of both versions with the settings of the first version's benchmark."""
    from hf2mnn.evaluation.benchmark import time_versions
    from hf2mnn.report.evidence import BENCHMARK, BUNDLES

    if before.speed is None:
        raise Hf2mnnError(
            f"{before.folder / BENCHMARK} is missing, but --benchmark uses its settings: run 'hf2mnn benchmark'"
        )
    names = [[row.name for row in side.variants if BUNDLES in row.manifests] for side in (before, after)]
    shared = [name for name in names[0] if name in names[1]]
    if not shared:
        raise Hf2mnnError(f"{before.folder} and {after.folder} have no bundle with the same name to time")
    folders = ({name: side.folder / BUNDLES / name for name in shared} for side in (before, after))
    return time_versions(*folders, before.speed, python)
