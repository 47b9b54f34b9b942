"""The `compare` stage: one row for PyTorch, one for each boundary and variant, and a verdict for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf2mnn.errors import Hf2mnnError, ManifestError
from hf2mnn.evaluate.answers import ANSWERS, SUMMARY
from hf2mnn.files import whole_file
from hf2mnn.manifest import Manifest
from hf2mnn.report.page import render_page

COLUMNS = [
    "model",
    "variant",
    "top1_agreement",
    "mean_kld",
    "greedy_match",
    "task_accuracy",
    "vision_cosine",
    "as_called_match",
    "as_called_accuracy",
    "bytes",
    "verdict",
    "required",
    "reason",
]
PASS, FAIL, REFERENCE = "pass", "FAIL", "reference"
# Gates on figures that must not be lower; of all others, the value must not be higher.
AT_LEAST = ("top1_agreement", "greedy_match", "vision_cosine")


@dataclass(frozen=True)
class RowSpec:
    """A row to make: its evaluation folder, its gates, and whether missing one fails the run."""

    name: str
    folder: Path
    required: bool
    gates: dict[str, float]


def reasons(summary: dict[str, Any], reference_right: int, gates: dict[str, float]) -> list[str]:
    """Each gate that is missed, as "figure value, gate bound"; a gate on a figure that was not measured is missed."""
    missed = []
    lost = None
    if summary["task_accuracy"] is not None:
        lost = reference_right - round(summary["task_accuracy"] * summary["labelled"])
    for gate, bound in sorted(gates.items()):
        if gate == "answers_lost":
            value, kept = lost, lost is None or lost <= bound
        elif gate == "accuracy_lost":
            value = None if lost is None else lost / summary["labelled"]
            kept = lost is None or value <= bound
        elif (value := summary[gate]) is None:
            # No pictures, no cosine: nothing to keep. Every other figure is always measured.
            kept = gate == "vision_cosine"
        else:
            kept = value >= bound if gate in AT_LEAST else value <= bound
        if not kept:
            shown = "not measured" if value is None else f"{value:.4g}"
            missed.append(f"{gate} {shown}, {'at least' if gate in AT_LEAST else 'at most'} {bound:g} wanted")
    return missed


def table(model: str, reference: Path, rows: list[RowSpec]) -> pd.DataFrame:
    """The comparison with COLUMNS, PyTorch first, then `rows` in their order."""
    upstream = Manifest.load(reference)
    labelled, right = upstream.results["labelled"], upstream.results["right"]
    source = {
        "model": model,
        "variant": "pytorch",
        "top1_agreement": 1.0,
        "mean_kld": 0.0,
        "greedy_match": 1.0,
        "task_accuracy": right / labelled if labelled else None,
        "vision_cosine": 1.0,
        "verdict": REFERENCE,
        "required": False,
        "reason": "",
    }
    made = [source]
    for row in rows:
        summary = json.loads((row.folder / SUMMARY).read_text())
        missed = reasons(summary, right, row.gates)
        made.append(
            {column: summary.get(column) for column in COLUMNS}
            | {"model": model, "variant": row.name, "required": row.required}
            | {"verdict": FAIL if missed else PASS, "reason": "; ".join(missed)}
        )
    frame = pd.DataFrame(made, columns=COLUMNS)
    frame["bytes"] = frame["bytes"].astype("Int64")
    return frame


def compare(model: str, reference: Path, rows: list[RowSpec], destination: Path, page: Path) -> pd.DataFrame:
    """Write the table as csv and the page beside it.

    Raises:
        ManifestError: an evaluation is missing or not what its manifest says.
    """
    upstream = Manifest.load(reference)
    upstream.verify()
    for row in rows:
        evaluation = Manifest.load(row.folder)
        evaluation.verify()
        if evaluation.inputs.get("reference") != upstream.digest():
            raise ManifestError(f"{row.folder} was measured against another reference than {reference}; evaluate again")
    frame = table(model, reference, rows)
    with whole_file(destination) as path:
        frame.to_csv(path, index=False)
    answers = {row.name: pd.read_parquet(row.folder / ANSWERS) for row in rows}
    manifests = {"reference": Manifest.load(reference)} | {row.name: Manifest.load(row.folder) for row in rows}
    with whole_file(page) as path:
        path.write_text(render_page(model, frame, answers, reference, manifests), encoding="utf-8")
    return frame


def read_table(path: Path) -> pd.DataFrame:
    """A summary.csv. Raises Hf2mnnError where it is missing or is not one."""
    try:
        names = ("model", "variant", "verdict", "reason")  # a model may be called 007, or null
        kinds = dict.fromkeys(names, str) | {"bytes": "Int64"}
        holes = {column: [""] for column in COLUMNS if column not in names}
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=holes)
    except (OSError, ValueError) as error:
        error = " ".join(str(error).split())
        raise Hf2mnnError(
            f"{path} is not a comparison that hf2mnn wrote ({error}); run 'hf2mnn compare' first"
        ) from None
    if list(frame.columns) != COLUMNS:
        raise Hf2mnnError(f"{path} is not a comparison of this version of hf2mnn; delete it and run snakemake again")
    frame["reason"] = frame["reason"].fillna("")
    return frame


def join_tables(paths: list[Path], destination: Path) -> pd.DataFrame:
    """All models' tables under each other."""
    frame = pd.concat([read_table(path) for path in paths], ignore_index=True)
    with whole_file(destination) as path:
        frame.to_csv(path, index=False)
    return frame


def missed_gates(frame: pd.DataFrame) -> list[str]:
    """A sentence for each required row that misses a gate."""
    failed = frame[(frame["verdict"] == FAIL) & frame["required"].astype(bool)]
    return [f"{row.model}/{row.variant}: {row.reason}" for row in failed.itertuples()]
