"""Summary of a model: figures and verdict of each variant, with PyTorch in the first row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.files import atomic_file
from hf2mnn.figures import FIGURES, HIGHER, IMAGES, TABLE, UNITS, shown_in
from hf2mnn.report.evidence import BUNDLES, REFERENCE_FOLDER, Evidence, VariantEvidence

TYPES = {column: "Int64" if UNITS[f.unit].integer else "float64" for f in shown_in(TABLE) for column in f.columns}
"""Columns of figures and their types, the same for all models so that their tables can be joined."""
COLUMNS = ["model", "variant", *TYPES, "verdict", "required", "reason", "cause"]
SUMMARY = "summary.csv"
NAMES = ("model", "variant", "verdict", "reason", "cause")
PASS, FAIL, REFERENCE = "pass", "FAIL", "reference"


class VariantSpec(NamedTuple):
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


def _values(evidence: Evidence, variant: VariantEvidence) -> dict[str, Any]:
    """Return the values of a variant's figures by name; those that were not measured are missing or None."""
    timed = (evidence.speed or {}).get("bundles", {}).get(variant.name, {}).get("measures", {})
    values = {name: runs["median"] for name, runs in timed.items()} | variant.summary
    values["findings"] = None if variant.layers is None else len(variant.findings)
    bundle = variant.manifests[BUNDLES].results if BUNDLES in variant.manifests else {}
    if "decoder_layout" in bundle:
        values["nc4hw4_decoder"] = int(bundle["decoder_layout"] == "NC4HW4")
        values["layout_reason"] = bundle.get("layout_reason")
    return values


def make_table(evidence: Evidence, specs: list[VariantSpec]) -> pd.DataFrame:
    """Return the summary with COLUMNS: PyTorch first, then the variants in their order."""
    labelled, right = (evidence.manifests[REFERENCE_FOLDER].results[key] for key in ("labelled", "right"))
    no_image = all(variant.summary.get("vision_cosine") is None for variant in evidence.variants)
    first = {figure.name: figure.pytorch for figure in shown_in(TABLE) if not (no_image and figure.source == IMAGES)}
    first |= {"variant": "pytorch", "task_accuracy": right / labelled if labelled else None}
    rows = [first | {"verdict": REFERENCE, "required": False, "reason": "", "cause": ""}]
    for variant, spec in zip(evidence.variants, specs, strict=True):
        values = _values(evidence, variant)
        missed = reasons(values, right, spec.gates)
        causes = [finding["message"] for finding in variant.findings]
        values |= {"variant": variant.name, "verdict": FAIL if missed else PASS, "required": spec.required}
        rows.append(values | {"reason": "; ".join(missed), "cause": "; ".join(causes)})
    return pd.DataFrame(rows, columns=COLUMNS).assign(model=evidence.model).astype(TYPES)


def read_table(path: Path) -> pd.DataFrame:
    """Read a summary.csv; raise Hf2mnnError if it is missing or is not a summary of this version."""
    try:
        # Models may be named 007 or null.
        missing = {column: [""] for column in COLUMNS if column not in NAMES}
        frame = pd.read_csv(path, dtype=dict.fromkeys(NAMES, str) | TYPES, keep_default_na=False, na_values=missing)
    except (OSError, ValueError) as error:
        error = " ".join(str(error).split())
        raise Hf2mnnError(f"{path} is not a summary of hf2mnn ({error}); run 'hf2mnn report' first") from None
    if list(frame.columns) != COLUMNS or frame.empty:
        raise Hf2mnnError(f"{path} has the columns of another version of hf2mnn; delete it and run snakemake again")
    return frame


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as csv, and as parquet next to it."""
    for destination, write in ((path, frame.to_csv), (path.with_suffix(".parquet"), frame.to_parquet)):
        with atomic_file(destination) as partial:
            write(partial, index=False)


def join_tables(paths: list[Path], destination: Path) -> pd.DataFrame:
    """Concatenate the summaries of all models, and write them as csv and parquet."""
    frame = pd.concat([read_table(path) for path in paths], ignore_index=True)
    write_table(frame, destination)
    return frame


def missed_gates(frame: pd.DataFrame) -> list[str]:
    """Describe each required variant that misses a gate."""
    failed = frame[(frame["verdict"] == FAIL) & frame["required"].astype(bool)]
    cause = failed["cause"].map(lambda text: f" (cause: {text})" if text else "")
    return list(failed["model"] + "/" + failed["variant"] + ": " + failed["reason"] + cause)
