"""Summary of a model: figures and verdict of each variant, with PyTorch in the first row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.files import atomic_file
from hf2mnn.figures import BENCHMARK, FIGURES, HIGHER, IMAGES, TABLE, UNITS, measured_on, shown_in
from hf2mnn.report.evidence import BUNDLES, REFERENCE_FOLDER, Evidence, VariantEvidence

TYPES = {
    column: "Int64" if UNITS[figure.unit].integer else "float64"
    for figure in shown_in(TABLE)
    for column in figure.columns
}
"""Columns of figures and their types, the same for all models so that their tables can be joined."""
COLUMNS = ["model", "variant", *TYPES, "verdict", "required", "reason", "cause"]
SUMMARY = "summary.csv"
NAMES = ("model", "variant", "verdict", "reason", "cause")
PASS, FAIL, REFERENCE = "pass", "FAIL", "reference"


@dataclass(frozen=True)
class VariantSpec:
    """Gates of a variant."""

    name: str
    required: bool  # Whether a missed gate fails the run.
    gates: dict[str, float]  # Bounds by figure.


def reasons(values: dict[str, Any], reference_right: float, gates: dict[str, float]) -> list[str]:
    """Return each missed gate as "figure value, bound wanted".

    A gate on a figure that was not measured is missed, unless the figure is optional. Besides figures, `values` holds
    `labelled`, the number of labelled examples; `fault` of a bundle that does not run; `layout_reason` of a decoder in
    the slower layout. `reference_right` is the number of correct answers of PyTorch.
    """
    if values.get("fault"):
        return [values["fault"]]
    if values["task_accuracy"] is not None:
        lost = round(reference_right - values["task_accuracy"] * values["labelled"], 6)
        values = values | {"answers_lost": lost, "accuracy_lost": lost / values["labelled"]}
    missed = []
    for name, bound in sorted(gates.items()):
        figure, value = FIGURES[name], values.get(name)
        if not figure.keeps(value, bound):
            shown = "not measured" if value is None else f"{value:.4g}"
            missed.append(f"{name} {shown}, {'at least' if figure.better == HIGHER else 'at most'} {bound:g} wanted")
            if name == "nc4hw4_decoder" and values.get("layout_reason"):
                missed[-1] += f" ({values['layout_reason']})"
    return missed


def _figures(evidence: Evidence, variant: VariantEvidence) -> dict[str, Any]:
    """Return the values of a variant's figures by name; those that were not measured are missing or None."""
    timed = (evidence.speed or {}).get("bundles", {}).get(variant.name, {}).get("measures", {})
    bundle = variant.manifests[BUNDLES].results if BUNDLES in variant.manifests else {}
    values = {figure.name: timed[figure.name]["median"] for figure in measured_on(BENCHMARK) if figure.name in timed}
    values |= variant.summary
    values["findings"] = None if variant.layers is None else len(variant.findings)
    if "decoder_layout" in bundle:
        values["nc4hw4_decoder"] = int(bundle["decoder_layout"] == "NC4HW4")
        values["layout_reason"] = bundle.get("layout_reason")
    return values


def _row(evidence: Evidence, variant: VariantEvidence, spec: VariantSpec, right: float) -> dict[str, Any]:
    values = _figures(evidence, variant)
    missed = reasons(values, right, spec.gates)
    row = {"model": evidence.model, "variant": variant.name, "required": spec.required}
    row |= {"verdict": FAIL if missed else PASS, "reason": "; ".join(missed)}
    row |= {"cause": "; ".join(finding["message"] for finding in variant.findings)}
    return {column: values.get(column) for column in TYPES} | row


def make_table(evidence: Evidence, specs: list[VariantSpec]) -> pd.DataFrame:
    """Return the summary with COLUMNS: PyTorch first, then the variants in their order."""
    labelled, right = (evidence.manifests[REFERENCE_FOLDER].results[key] for key in ("labelled", "right"))
    no_image = all(variant.summary.get("vision_cosine") is None for variant in evidence.variants)
    first = {figure.name: figure.pytorch for figure in shown_in(TABLE) if not (no_image and figure.source == IMAGES)}
    first |= {"model": evidence.model, "variant": "pytorch", "task_accuracy": right / labelled if labelled else None}
    first |= {"verdict": REFERENCE, "required": False, "reason": "", "cause": ""}
    rows = [_row(evidence, variant, spec, right) for variant, spec in zip(evidence.variants, specs, strict=True)]
    return pd.DataFrame([first, *rows], columns=COLUMNS).astype(TYPES)


def read_table(path: Path) -> pd.DataFrame:
    """Read a summary.csv.

    Raises:
        Hf2mnnError: The file is missing or is not a summary of this version.
    """
    try:
        # Models may be named 007 or null.
        kinds = dict.fromkeys(NAMES, str) | {name: kind for name, kind in TYPES.items() if kind == "Int64"}
        missing = {column: [""] for column in COLUMNS if column not in NAMES}
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=missing)
    except (OSError, ValueError) as error:
        error = " ".join(str(error).split())
        raise Hf2mnnError(f"{path} is not a summary of hf2mnn ({error}); run 'hf2mnn report' first") from None
    if list(frame.columns) != COLUMNS or frame.empty:
        raise Hf2mnnError(f"{path} has the columns of another version of hf2mnn; delete it and run snakemake again")
    return frame


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as csv, and as parquet next to it."""
    with atomic_file(path) as partial:
        frame.to_csv(partial, index=False)
    with atomic_file(path.with_suffix(".parquet")) as partial:
        frame.to_parquet(partial, index=False)


def join_tables(paths: list[Path], destination: Path) -> pd.DataFrame:
    """Concatenate the summaries of all models, and write them as csv and parquet."""
    frame = pd.concat([read_table(path) for path in paths], ignore_index=True)
    write_table(frame, destination)
    return frame


def missed_gates(frame: pd.DataFrame) -> list[str]:
    """Describe each required variant that misses a gate."""
    failed = frame[(frame["verdict"] == FAIL) & frame["required"].astype(bool)]
    return [
        f"{row.model}/{row.variant}: {row.reason}{f' (cause: {row.cause})' if row.cause else ''}"
        for row in failed.itertuples()
    ]
