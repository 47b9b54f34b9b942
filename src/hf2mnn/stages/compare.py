"""compare: the finished results of two versions of a model -> changes.csv and changes.md; may time their bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.stage import Footprint, Stage

if TYPE_CHECKING:
    from hf2mnn.report.evidence import Evidence

STAGE = Stage("compare", tools=("MNN", "numpy"), footprint=Footprint(1500, 4.2, 60, 240))


def run(
    before: Annotated[Path, typer.Argument(help="Results of a model: results/<model>.")],
    after: Annotated[
        Path | None, typer.Argument(help="Results of another version; by default the first is shown alone.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer: PyTorch, ONNX and MNN on the same input.")
    ] = False,
    variant: Annotated[list[str] | None, typer.Option(help="Only this variant; repeat for more.")] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Time the bundles of both versions now, in interleaved runs.")
    ] = False,
    toolchain: Annotated[
        Path | None,
        typer.Option(help="Folder of 'hf2mnn toolchain' whose engine runs the other version, for --benchmark."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for changes.csv and changes.md.")] = None,
) -> None:
    """Report differences between two versions of a model, and the first layer that changed.

    With --layers it shows where each variant exceeds its tolerance.

    Example: hf2mnn compare results/qwen2-vl-2b results/qwen2.5-vl-3b

    Example: hf2mnn compare --layers results/shapes-vl
    """
    from hf2mnn.report.console import print_layers, print_table, print_versions
    from hf2mnn.report.versions import compare_versions, read_report, write_changes

    reports = []
    for folder in filter(None, (before, after)):
        evidence, table = read_report(folder, variant)
        reports.append((evidence, table))
        print_table(table)
        if layers:
            print_layers(evidence)
    if not after:
        return
    both, tables = zip(*reports, strict=True)
    python = toolchain.resolve() / "bin" / "python" if toolchain else None
    speeds = _time_both(*both, python) if benchmark else None
    versions = compare_versions(*both, speeds=speeds)
    if out:
        write_changes(out, versions, tables, speeds or ({}, {}))
    print_versions(versions)


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
