"""The tables of a model, and its page."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.files import whole_file
from hf2mnn.evaluation.figures import COLUMNS
from hf2mnn.report.evidence import BENCHMARK, REFERENCE_FOLDER, Evidence, read_evidence
from hf2mnn.report.page import render_page
from hf2mnn.report.table import SUMMARY, RowSpec, make_table, write_table

FIGURES, PAGE = "figures.csv", "report.html"


def check_upstream(evidence: Evidence) -> None:
    """Raises ManifestError where two stages of a model were not made of the same things."""
    reference = evidence.manifests[REFERENCE_FOLDER].digest()
    for row in evidence.rows:
        stages = {stage: row.manifests[stage] for stage in ("evaluate", "diagnose") if stage in row.manifests}
        for stage, manifest in stages.items():
            if manifest.inputs.get("reference") != reference:
                raise ManifestError(
                    f"{manifest.folder} was measured against another reference than {evidence.reference}; run"
                    f" 'hf2mnn {stage}' again"
                )
        if len({manifest.inputs.get("bundle") for manifest in stages.values()}) > 1:
            raise ManifestError(f"evaluation and diagnosis of {row.name} are not of the same bundle; run them again")
        if "bundle" in row.manifests and stages["evaluate"].inputs.get("bundle") != row.manifests["bundle"].digest():
            raise ManifestError(
                f"{row.manifests['bundle'].folder} was made again after its evaluation; run 'hf2mnn evaluate' again"
            )
    speed = evidence.manifests.get(BENCHMARK)
    for row in evidence.rows if speed else []:
        timed, bundle = speed.inputs.get(row.name), row.manifests.get("bundle")
        if timed and bundle and timed != bundle.digest():
            raise ManifestError(
                f"{speed.folder} timed another bundle than {bundle.folder}; run 'hf2mnn benchmark' again"
            )


def make_report(model: str, folder: Path, specs: list[RowSpec]) -> pd.DataFrame:
    """Write summary (csv, parquet), figures (csv, parquet: every figure of every row with its interval) and report.html
    into `folder`, results/<model>; gives the summary.

    Raises:
        ManifestError: an evaluation is missing, or stages do not belong together.
    """
    evidence = read_evidence(model, folder, [spec.name for spec in specs])
    check_upstream(evidence)
    table = make_table(evidence, specs)
    figures = [row.figures.assign(model=model, variant=row.name) for row in evidence.rows if len(row.figures)]
    figures = figures or [pd.DataFrame(columns=[*COLUMNS, "model", "variant"])]
    write_table(table, folder / SUMMARY)
    write_table(pd.concat(figures, ignore_index=True), folder / FIGURES)
    with whole_file(folder / PAGE) as path:
        path.write_text(render_page(evidence, table), encoding="utf-8")
    return table
