"""report: folders of all other stages -> summary.csv, figures.csv, parquet of both, report.html; computes no figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf2mnn.core.stage import Footprint, Stage

if TYPE_CHECKING:
    import pandas as pd

    from hf2mnn.report.table import VariantSpec

STAGE = Stage("report", tools=("pillow",), footprint=Footprint(2000, 0, 30, 0))


def run(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    folder: Annotated[
        Path, typer.Argument(help="Results of the model; summary, figures and report.html are written there.")
    ],
    variants: Annotated[str, typer.Option(help="Variants in order, JSON: name, required, gates.")],
) -> None:
    """Write the table of a model's conversions with their verdicts, and the page with the evidence.

    Example: hf2mnn report shapes-vl results/shapes-vl
        --variants '[{"name": "int4", "required": false, "gates": {"mean_kld": 0.1}}]'
    """
    from hf2mnn.config.load import parse_option
    from hf2mnn.config.variants import ReportVariants
    from hf2mnn.report.table import VariantSpec

    specs = parse_option(ReportVariants, variants, "--variants")
    make_report(model, folder, [VariantSpec(**spec) for spec in specs])


def make_report(model: str, folder: Path, specs: list[VariantSpec]) -> pd.DataFrame:
    """Write the tables, as csv and parquet, and the page of a model into its results folder; return the summary."""
    import pandas as pd

    from hf2mnn.core.files import atomic_file
    from hf2mnn.evaluation.aggregate import COLUMNS
    from hf2mnn.report.evidence import check_inputs, read_evidence
    from hf2mnn.report.page import render_page
    from hf2mnn.report.table import SUMMARY, make_table, write_table

    evidence = read_evidence(model, folder, [spec.name for spec in specs])
    check_inputs(evidence)
    table = make_table(evidence, specs)
    measured = [variant for variant in evidence.variants if len(variant.figures)]
    figures = [variant.figures.assign(model=model, variant=variant.name) for variant in measured]
    figures = figures or [pd.DataFrame(columns=[*COLUMNS, "model", "variant"])]
    write_table(table, folder / SUMMARY)
    write_table(pd.concat(figures, ignore_index=True), folder / "figures.csv")
    with atomic_file(folder / "report.html") as path:
        path.write_text(render_page(evidence, table), encoding="utf-8")
    return table
