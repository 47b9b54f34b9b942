"""report: all conversions of a model in one table with a verdict, and one page with the evidence.

Reads the folders of all other stages; computes no figure and starts nothing.
Writes summary.csv, figures.csv (with parquet beside them) and report.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hf2mnn.core.stage import Stage
from hf2mnn.machine.footprint import Footprint

if TYPE_CHECKING:
    import pandas as pd

    from hf2mnn.report.table import VariantSpec

STAGE = Stage("report", tools=("pillow",), footprint=Footprint(2000, 0, 30, 0))


def run(model: str, folder: Path, specs: list[VariantSpec]) -> pd.DataFrame:
    """Write the tables, as csv and parquet, and the page of a model into its results folder; return the summary.

    Raises:
        ManifestError: An evaluation is missing, or stages do not belong together.
    """
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
