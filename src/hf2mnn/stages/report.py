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
    """Write the tables and the page of a model into its results folder, and return the summary.

    Raises:
        ManifestError: An evaluation is missing, or stages do not belong together.
    """
    from hf2mnn.report.report import make_report

    return make_report(model, folder, specs)
