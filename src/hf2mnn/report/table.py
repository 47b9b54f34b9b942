"""The comparison: one row for PyTorch, one for each conversion, and a verdict for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf2mnn.core.errors import Hf2mnnError
from hf2mnn.core.files import whole_file
from hf2mnn.evaluation.names import COMPARED
from hf2mnn.report.evidence import REFERENCE_FOLDER, Evidence, Row

FIGURES = [*COMPARED, "mean_kld_low", "mean_kld_high", "cache_parity"]
"""Of an evaluation's summary."""
SPEEDS = ["load_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "vision_s", "bundle_mb"]
"""Medians of `hf2mnn.evaluation.benchmark`."""
COLUMNS = ["model", "variant", *FIGURES, "bytes", *SPEEDS, "findings", "verdict", "required", "reason", "cause"]
SUMMARY = "summary.csv"
NAMES = ("model", "variant", "verdict", "reason", "cause")
PASS, FAIL, REFERENCE = "pass", "FAIL", "reference"
# Gates on figures that must not be lower; of all others, the value must not be higher.
AT_LEAST = ("top1_agreement", "greedy_match", "vision_cosine", "tokenizer_match", "template_match")
# Where there was nothing to measure there is nothing to keep: no images, no tokenizer, no template, no diagnosis.
OPTIONAL = ("vision_cosine", "tokenizer_match", "template_match", "findings", "cache_parity")
EXACT = {"top1_agreement": 1.0, "top5_overlap": 1.0, "mean_kld": 0.0, "greedy_match": 1.0, "vision_cosine": 1.0}


@dataclass(frozen=True)
class RowSpec:
    """A row to make: its name, its gates, and whether missing one fails the run."""

    name: str
    required: bool
    gates: dict[str, float]


def reasons(summary: dict[str, Any], reference_right: float, gates: dict[str, float]) -> list[str]:
    """Each gate that is missed, as "figure value, gate bound"; a gate on a figure that was not measured is missed."""
    if summary.get("fault"):
        return [summary["fault"]]
    missed = []
    lost = None
    if summary["task_accuracy"] is not None:
        lost = round(reference_right - summary["task_accuracy"] * summary["labelled"], 6)
    for gate, bound in sorted(gates.items()):
        if gate == "answers_lost":
            value, kept = lost, lost is None or lost <= bound
        elif gate == "accuracy_lost":
            value = None if lost is None else lost / summary["labelled"]
            kept = lost is None or value <= bound
        elif (value := summary.get(gate)) is None:
            kept = gate in OPTIONAL
        else:
            kept = value >= bound if gate in AT_LEAST else value <= bound
        if not kept:
            shown = "not measured" if value is None else f"{value:.4g}"
            missed.append(f"{gate} {shown}, {'at least' if gate in AT_LEAST else 'at most'} {bound:g} wanted")
    return missed


def _speeds(evidence: Evidence, name: str) -> dict[str, float]:
    measured = (evidence.speed or {}).get("bundles", {}).get(name, {}).get("measures", {})
    return {column: measured[column]["median"] for column in SPEEDS if column in measured}


def _row(evidence: Evidence, row: Row, spec: RowSpec, right: float) -> dict[str, Any]:
    findings = None if row.layers is None else len(row.findings)
    missed = reasons(row.summary | {"findings": findings}, right, spec.gates)
    return {
        "model": evidence.model,
        "variant": row.name,
        **{column: row.summary.get(column) for column in [*FIGURES, "bytes"]},
        **_speeds(evidence, row.name),
        "findings": findings,
        "verdict": FAIL if missed else PASS,
        "required": spec.required,
        "reason": "; ".join(missed),
        "cause": "; ".join(finding["sentence"] for finding in row.findings),
    }


def make_table(evidence: Evidence, specs: list[RowSpec]) -> pd.DataFrame:
    """The comparison with COLUMNS, PyTorch first, then the rows in their order."""
    labelled, right = (evidence.manifests[REFERENCE_FOLDER].results[key] for key in ("labelled", "right"))
    accuracy = right / labelled if labelled else None
    source = {"model": evidence.model, "variant": "pytorch", **EXACT, "task_accuracy": accuracy, "verdict": REFERENCE}
    source |= {"required": False, "reason": "", "cause": ""}
    if all(row.summary.get("vision_cosine") is None for row in evidence.rows):  # a set without images
        del source["vision_cosine"]
    made = [_row(evidence, row, spec, right) for row, spec in zip(evidence.rows, specs, strict=True)]
    frame = pd.DataFrame([source, *made], columns=COLUMNS)
    kinds = dict.fromkeys([*FIGURES, *SPEEDS], "float64") | {"bytes": "Int64", "findings": "Int64"}
    return frame.astype(kinds)  # also of what nothing was measured of, so that all models' files fit together


def read_table(path: Path) -> pd.DataFrame:
    """A summary.csv. Raises Hf2mnnError where it is missing or is not one."""
    try:
        # A model may be called 007, or null.
        kinds = dict.fromkeys(NAMES, str) | {"bytes": "Int64", "findings": "Int64"}
        holes = {column: [""] for column in COLUMNS if column not in NAMES}
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=holes)
    except (OSError, ValueError) as error:
        error = " ".join(str(error).split())
        raise Hf2mnnError(
            f"{path} is not a comparison that hf2mnn wrote ({error}); run 'hf2mnn report' first"
        ) from None
    if list(frame.columns) != COLUMNS or frame.empty:
        raise Hf2mnnError(f"{path} is not a comparison of this version of hf2mnn; delete it and run snakemake again")
    return frame


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """As csv, and beside it the same as parquet."""
    with whole_file(path) as partial:
        frame.to_csv(partial, index=False)
    with whole_file(path.with_suffix(".parquet")) as partial:
        frame.to_parquet(partial, index=False)


def join_tables(paths: list[Path], destination: Path) -> pd.DataFrame:
    """All models' tables under each other, as csv and parquet."""
    frame = pd.concat([read_table(path) for path in paths], ignore_index=True)
    write_table(frame, destination)
    return frame


def missed_gates(frame: pd.DataFrame) -> list[str]:
    """A sentence for each required row that misses a gate."""
    failed = frame[(frame["verdict"] == FAIL) & frame["required"].astype(bool)]
    return [
        f"{row.model}/{row.variant}: {row.reason}{f' (cause: {row.cause})' if row.cause else ''}"
        for row in failed.itertuples()
    ]
