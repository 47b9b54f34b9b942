"""Work of the `report` stage: check that the stages belong together, then write the tables and the page."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.files import atomic_file
from hf2mnn.evaluation.aggregate import COLUMNS
from hf2mnn.report.evidence import BENCHMARK, BUNDLES, DIAGNOSIS, EVALUATION, REFERENCE_FOLDER, Evidence, read_evidence
from hf2mnn.report.page import render_page
from hf2mnn.report.table import SUMMARY, VariantSpec, make_table, write_table

FIGURES, PAGE = "figures.csv", "report.html"
COMMANDS = {EVALUATION: "evaluate", DIAGNOSIS: "diagnose"}


def check_inputs(evidence: Evidence) -> None:
    """Check that all stages of a model used the same reference and bundles.

    Raises:
        ManifestError: A stage used another reference or another bundle.
    """
    reference = evidence.manifests[REFERENCE_FOLDER].digest()
    benchmark = evidence.manifests.get(BENCHMARK)
    for variant in evidence.variants:
        measured = {folder: variant.manifests[folder] for folder in COMMANDS if folder in variant.manifests}
        for folder, manifest in measured.items():
            if manifest.inputs.get("reference") != reference:
                raise ManifestError(
                    f"{manifest.folder} was measured against another reference than {evidence.reference}; run"
                    f" 'hf2mnn {COMMANDS[folder]}' again"
                )
        if len({manifest.inputs.get("bundle") for manifest in measured.values()}) > 1:
            raise ManifestError(f"evaluation and diagnosis of {variant.name} used different bundles; run both again")
        if (bundle := variant.manifests.get(BUNDLES)) is None:
            continue
        if measured[EVALUATION].inputs.get("bundle") != bundle.digest():
            raise ManifestError(f"{bundle.folder} is newer than its evaluation; run 'hf2mnn evaluate' again")
        timed = benchmark.inputs.get(variant.name) if benchmark else None
        if timed and timed != bundle.digest():
            raise ManifestError(
                f"{benchmark.folder} timed another bundle than {bundle.folder}; run 'hf2mnn benchmark' again"
            )


def make_report(model: str, folder: Path, specs: list[VariantSpec]) -> pd.DataFrame:
    """Write summary.csv, figures.csv (both also as parquet) and report.html; return the summary.

    Raises:
        ManifestError: An evaluation is missing, or stages do not belong together.
    """
    evidence = read_evidence(model, folder, [spec.name for spec in specs])
    check_inputs(evidence)
    table = make_table(evidence, specs)
    known = [variant for variant in evidence.variants if len(variant.figures)]
    figures = [variant.figures.assign(model=model, variant=variant.name) for variant in known]
    figures = figures or [pd.DataFrame(columns=[*COLUMNS, "model", "variant"])]
    write_table(table, folder / SUMMARY)
    write_table(pd.concat(figures, ignore_index=True), folder / FIGURES)
    with atomic_file(folder / PAGE) as path:
        path.write_text(render_page(evidence, table), encoding="utf-8")
    return table
