"""Small evidence for the tests of the report: conversions in memory, and folders as the stages leave them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from hf2mnn.core.manifest import Manifest, stage_folder
from hf2mnn.evaluation import figures, layers, parity
from hf2mnn.evaluation.score import IMAGE_COLUMNS, POSITION_COLUMNS
from hf2mnn.reference.golden import PROBES
from hf2mnn.report.evidence import Evidence, Row

SUMMARY: dict[str, Any] = {
    "fault": None,
    "top1_agreement": 0.95,
    "top5_overlap": 0.9,
    "mean_kld": 0.1,
    "mean_kld_low": 0.08,
    "mean_kld_high": 0.12,
    "greedy_match": 0.9,
    "task_accuracy": 0.75,
    "vision_cosine": 0.99,
    "cache_parity": 0.01,
    "tokenizer_match": 1.0,
    "template_match": 1.0,
    "as_called_accuracy": 0.25,
    "bytes": 4_515_196,
    "labelled": 20,
}
POINTS = ["model.visual.patch_embed.proj", "model.language_model.layers.2", "model.language_model.layers.10", "lm_head"]
"""In the order of computation, which is not that of the alphabet."""


def figure_table(**intervals: tuple[float, float, float]) -> pd.DataFrame:
    """Figures over the whole set: value, low and high by name."""
    return pd.DataFrame([("all", name, *seen, 100) for name, seen in intervals.items()], columns=figures.COLUMNS)


def layer_table(local: dict[str, float] | None = None, points: list[str] = POINTS) -> pd.DataFrame:
    """One probe, sound but for the errors `local` that MNN's own operators make, by point; 0.1 is allowed."""
    rows = []
    for order, point in enumerate(points):
        part = "vision" if "visual" in point else "decoder"
        alone = (local or {}).get(point, 1e-6)
        errors = {"onnx_error": 1e-6, "onnx_cosine": 1.0, "mnn_error": 0.02, "mnn_cosine": 0.9998, "mnn_local": alone}
        row = {"probe": "text", "part": part, "order": order, "point": point, "operator": "linear layer", **errors}
        rows.append(row | {"tolerance": 0.1, "onnx_tolerance": 1e-3, "looks": ""})
    return pd.DataFrame(rows, columns=layers.COLUMNS)


def finding(sentence: str) -> dict[str, Any]:
    return {"part": "decoder", "point": None, "sentence": sentence}


def make_row(name: str = "int4", findings: tuple[str, ...] = (), diagnosed: bool = True, **summary: Any) -> Row:
    """A conversion as it is read, with SUMMARY but for what is given."""
    return Row(
        name=name,
        summary=SUMMARY | summary,
        figures=figure_table(mean_kld=(0.1, 0.08, 0.12)),
        answers=pd.DataFrame(columns=["id", "template_match", "template_difference"]),
        positions=pd.DataFrame(columns=POSITION_COLUMNS),
        parity=pd.DataFrame(columns=parity.COLUMNS),
        layers=layer_table() if diagnosed else None,
        budget=None,
        findings=[finding(sentence) for sentence in findings],
        manifests={},
    )


def make_speed(**measures: tuple[float, float, float]) -> dict[str, Any]:
    """Of one bundle: median, lowest and highest run by measure."""
    names = ("median", "lowest", "highest")
    return {"measures": {measure: dict(zip(names, seen, strict=True)) for measure, seen in measures.items()}}


def make_evidence(
    rows: list[Row], folder: Path = Path("results/m"), speed: dict[str, Any] | None = None, right: int = 15
) -> Evidence:
    """A model of whose 20 labelled questions PyTorch answers `right`; `speed` is what `make_speed` gives, by bundle."""
    reference = Manifest("reference", results={"labelled": 20, "right": right})
    return Evidence("m", folder, rows, {"reference": reference}, {"bundles": speed} if speed else None, None)


def write_reference(folder: Path, tokens: int = 4, larger: dict[str, float] | None = None) -> Path:
    """What `hf2mnn reference` leaves, with two examples and a text probe of `tokens`; `larger` says by which share the
    activations at a point are.
    """
    record = {"category": "any", "language": "en", "metric": "exact", "answer": "a", "images": []}
    record |= {"messages": [{"role": "user", "content": "Which?"}], "prompt": "Which?"}
    records = [record | {"id": "labelled", "expected": ["a"]}, record | {"id": "free", "expected": None}]
    probe = {"ids": np.arange(tokens), "inputs_embeds": np.zeros((tokens, 2), np.float32)}
    probe["position_ids"] = np.zeros((3, tokens), np.int64)
    for point in POINTS:
        probe[point] = np.full((tokens, 2), 1 + (larger or {}).get(point, 0), np.float32)
    manifest = Manifest("reference", results={"examples": 2, "labelled": 1, "right": 1})
    with stage_folder(folder, manifest) as partial:
        (partial / "examples.json").write_text(json.dumps(records))
        save_file({"none": np.zeros(1)}, partial / "golden.safetensors")
        save_file(
            {f"text/{name}": array for name, array in probe.items()},
            partial / "activations.safetensors",
            {PROBES: json.dumps({"text": "free"})},
        )
    return folder


def write_bundle(folder: Path, content: str = "weights") -> Path:
    with stage_folder(folder, Manifest("quantize")) as partial:
        (partial / "llm.mnn").write_text(content)
    return folder


def write_evaluation(folder: Path, reference: Path, bundle: Path | None, row: Row) -> Path:
    """What `hf2mnn evaluate` leaves of `row`."""
    inputs = {"reference": reference} | ({"bundle": bundle} if bundle else {})
    manifest = Manifest("evaluate", {name: Manifest.load(path).digest() for name, path in inputs.items()})
    tables = {"figures": row.figures, "answers": row.answers, "metrics": row.positions, "parity": row.parity}
    with stage_folder(folder, manifest) as partial:
        (partial / "summary.json").write_text(json.dumps(row.summary))
        for name, frame in (tables | {"images": pd.DataFrame(columns=IMAGE_COLUMNS)}).items():
            frame.to_parquet(partial / f"{name}.parquet", index=False)
    return folder


def write_diagnosis(folder: Path, reference: Path, bundle: Path, row: Row) -> Path:
    """What `hf2mnn diagnose` leaves of `row`."""
    inputs = {"reference": reference, "bundle": bundle}
    manifest = Manifest("diagnose", {name: Manifest.load(path).digest() for name, path in inputs.items()})
    with stage_folder(folder, manifest) as partial:
        row.layers.to_parquet(partial / "layers.parquet", index=False)
        pd.DataFrame(columns=["source", "mean_kld", "positions"]).to_parquet(partial / "budget.parquet", index=False)
        (partial / "findings.json").write_text(json.dumps(row.findings))
    return folder


def write_results(folder: Path, *rows: Row) -> Path:
    """results/<model> before the report: ONNX Runtime, which has no bundle and no diagnosis, and `rows`."""
    reference = write_reference(folder / "reference")
    write_evaluation(folder / "evaluation" / "onnxruntime", reference, None, make_row("onnxruntime", labelled=1))
    for row in rows:
        row = replace(row, summary=row.summary | {"labelled": 1})
        bundle = write_bundle(folder / "bundles" / row.name)
        write_evaluation(folder / "evaluation" / row.name, reference, bundle, row)
        write_diagnosis(folder / "diagnosis" / row.name, reference, bundle, row)
    return folder
