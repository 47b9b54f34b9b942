"""Small evidence for tests of the report: variants in memory, and folders as the stages write them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from hf2mnn.core.manifest import Manifest, stage_folder
from hf2mnn.evaluation import aggregate, layers
from hf2mnn.evaluation.score import IMAGE_COLUMNS, PARITY_COLUMNS, POSITION_COLUMNS
from hf2mnn.reference.golden import PROBES
from hf2mnn.report.evidence import REFERENCE_FOLDER, Evidence, VariantEvidence

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
"""Tap points in the order of computation, which is not alphabetical."""


def figure_table(**intervals: tuple[float, float, float]) -> pd.DataFrame:
    """Return figures over the whole set, given as value, low and high by name."""
    rows = [("all", name, *interval, 100) for name, interval in intervals.items()]
    return pd.DataFrame(rows, columns=aggregate.COLUMNS)


def layer_table(local: dict[str, float] | None = None, points: list[str] = POINTS) -> pd.DataFrame:
    """Return layers of a text probe with the given local errors by tap point; others are 1e-6, the tolerance is 0.1."""
    rows = []
    for order, point in enumerate(points):
        row = {"probe": "text", "part": "vision" if "visual" in point else "decoder", "order": order, "point": point}
        row |= {"operator": "linear layer", "onnx_error": 1e-6, "onnx_cosine": 1.0, "mnn_error": 0.02}
        row |= {"mnn_cosine": 0.9998, "local_error": (local or {}).get(point, 1e-6)}
        rows.append(row | {"tolerance": 0.1, "onnx_tolerance": 1e-3, "detail": ""})
    return pd.DataFrame(rows, columns=layers.COLUMNS)


def make_variant(
    name: str = "int4", findings: tuple[str, ...] = (), diagnosed: bool = True, **summary: Any
) -> VariantEvidence:
    """Return a variant with the figures of SUMMARY, updated by `summary`, and findings with these messages."""
    return VariantEvidence(
        name=name,
        summary=SUMMARY | summary,
        figures=figure_table(mean_kld=(0.1, 0.08, 0.12)),
        answers=pd.DataFrame(columns=["id", "template_match", "template_difference"]),
        parity=pd.DataFrame(columns=PARITY_COLUMNS),
        layers=layer_table() if diagnosed else None,
        budget=None,
        findings=[{"part": "decoder", "point": None, "message": message} for message in findings],
        manifests={},
    )


def make_speed(**measures: tuple[float, float, float]) -> dict[str, Any]:
    """Return the speed of one bundle: median, lowest and highest run by measure."""
    names = ("median", "lowest", "highest")
    return {"measures": {measure: dict(zip(names, values, strict=True)) for measure, values in measures.items()}}


def make_evidence(
    variants: list[VariantEvidence],
    folder: Path = Path("results/m"),
    speed: dict[str, Any] | None = None,
    right: int = 15,
) -> Evidence:
    """Return a model with 20 labelled questions, of which PyTorch answers `right`; `speed` is by bundle."""
    manifests = {REFERENCE_FOLDER: Manifest("reference", results={"labelled": 20, "right": right})}
    return Evidence("m", folder, variants, manifests, {"bundles": speed} if speed else None, None)


def write_reference(folder: Path, tokens: int = 4, larger: dict[str, float] | None = None) -> Path:
    """Write a reference with two examples and a text probe.

    Args:
        folder: Output folder.
        tokens: Tokens of the probe.
        larger: Relative increase of the activations by tap point.
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


def write_evaluation(folder: Path, reference: Path, bundle: Path | None, variant: VariantEvidence) -> Path:
    """Write the folder of `hf2mnn evaluate`."""
    inputs = {"reference": reference} | ({"bundle": bundle} if bundle else {})
    manifest = Manifest("evaluate", inputs={name: Manifest.load(path).digest() for name, path in inputs.items()})
    tables = {"figures": variant.figures, "answers": variant.answers, "parity": variant.parity}
    tables |= {"metrics": pd.DataFrame(columns=POSITION_COLUMNS), "images": pd.DataFrame(columns=IMAGE_COLUMNS)}
    with stage_folder(folder, manifest) as partial:
        (partial / "summary.json").write_text(json.dumps(variant.summary))
        for name, frame in tables.items():
            frame.to_parquet(partial / f"{name}.parquet", index=False)
    return folder


def write_diagnosis(folder: Path, reference: Path, bundle: Path, variant: VariantEvidence) -> Path:
    """Write the folder of `hf2mnn diagnose`."""
    inputs = {"reference": reference, "bundle": bundle}
    manifest = Manifest("diagnose", inputs={name: Manifest.load(path).digest() for name, path in inputs.items()})
    with stage_folder(folder, manifest) as partial:
        variant.layers.to_parquet(partial / "layers.parquet", index=False)
        pd.DataFrame(columns=["source", "mean_kld", "positions"]).to_parquet(partial / "budget.parquet", index=False)
        (partial / "findings.json").write_text(json.dumps(variant.findings))
    return folder


def write_results(folder: Path, *variants: VariantEvidence) -> Path:
    """Write results/<model> without a report: `variants`, and ONNX Runtime, which has no bundle and no diagnosis."""
    reference = write_reference(folder / REFERENCE_FOLDER)
    write_evaluation(folder / "evaluation" / "onnxruntime", reference, None, make_variant("onnxruntime", labelled=1))
    for variant in variants:
        variant = replace(variant, summary=variant.summary | {"labelled": 1})
        bundle = write_bundle(folder / "bundles" / variant.name)
        write_evaluation(folder / "evaluation" / variant.name, reference, bundle, variant)
        write_diagnosis(folder / "diagnosis" / variant.name, reference, bundle, variant)
    return folder
