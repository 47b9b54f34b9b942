"""All that was measured about one model, as the report reads it from the stages' folders."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation.findings import misread_template, wrong_cache
from hf2mnn.evaluation.names import ANSWERS, BUDGET, FIGURES, FINDINGS, LAYERS, PARITY, POSITIONS, SUMMARY

REFERENCE_FOLDER, EVALUATIONS, DIAGNOSES, BUNDLES = "reference/evaluation", "evaluation", "diagnosis", "bundles"
PLANS, BENCHMARK = "plans", "benchmark"
SHARED = (
    *("checkpoint", "examples/evaluation", "examples/calibration", "onnx", "graphs", "reference/calibration"),
    *("calibration", "sensitivity"),
)
"""Folders of stages that all variants of a model share, beside the reference and the benchmark."""


@dataclass(frozen=True)
class Row:
    """One conversion: a variant, or "onnxruntime", which has no diagnosis and no bundle.

    summary, figures, answers, positions, parity: `hf2mnn.evaluation.score.Scores`; layers, budget, findings:
    `hf2mnn.evaluation.diagnose`; manifests by stage.
    """

    name: str
    summary: dict[str, Any]
    figures: pd.DataFrame
    answers: pd.DataFrame
    positions: pd.DataFrame
    parity: pd.DataFrame
    layers: pd.DataFrame | None
    budget: pd.DataFrame | None
    findings: list[dict[str, Any]]
    manifests: dict[str, Manifest]


@dataclass(frozen=True)
class Evidence:
    """A model's folder: the reference, each conversion in the table's order, and the speed of its bundles (None where
    it was not measured).
    """

    model: str
    folder: Path
    rows: list[Row]
    manifests: dict[str, Manifest]
    speed: dict[str, Any] | None
    cache: pd.DataFrame | None

    @property
    def reference(self) -> Path:
        return self.folder / REFERENCE_FOLDER


def _checked(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    manifest.verify()
    return manifest


def read_row(folder: Path, name: str) -> Row:
    """Raises ManifestError where the evaluation is missing or not what its manifest says."""
    evaluation, diagnosis, bundle = (folder / part / name for part in (EVALUATIONS, DIAGNOSES, BUNDLES))
    manifests = {"evaluate": _checked(evaluation)}
    if diagnosis.is_dir():
        manifests["diagnose"] = _checked(diagnosis)
    others = {"bundle": bundle, "plan": folder / PLANS / name}
    manifests |= {stage: Manifest.load(path) for stage, path in others.items() if path.is_dir()}
    known, parity = "diagnose" in manifests, pd.read_parquet(evaluation / PARITY)
    answers = pd.read_parquet(evaluation / ANSWERS)
    measured = [asdict(finding) for finding in [*misread_template(answers), *wrong_cache(parity)]]
    return Row(
        name=name,
        summary=json.loads((evaluation / SUMMARY).read_text()),
        figures=pd.read_parquet(evaluation / FIGURES),
        answers=answers,
        positions=pd.read_parquet(evaluation / POSITIONS),
        parity=parity,
        layers=pd.read_parquet(diagnosis / LAYERS) if known else None,
        budget=pd.read_parquet(diagnosis / BUDGET) if known else None,
        findings=(json.loads((diagnosis / FINDINGS).read_text()) if known else []) + measured,
        manifests=manifests,
    )


def read_evidence(model: str, folder: Path, names: list[str]) -> Evidence:
    """`folder` is results/<model>; `names` are the conversions in order.

    Raises:
        ManifestError: a stage is missing, or its files are not what its manifest says.
    """
    manifests = {name: Manifest.load(folder / name) for name in SHARED if (folder / name).is_dir()}
    manifests[REFERENCE_FOLDER] = _checked(folder / REFERENCE_FOLDER)
    speed, cache = folder / BENCHMARK / "benchmark.json", folder / BENCHMARK / "cache.parquet"
    if speed.is_file():
        manifests[BENCHMARK] = _checked(folder / BENCHMARK)
    return Evidence(
        model=model,
        folder=folder,
        rows=[read_row(folder, name) for name in names],
        manifests=manifests,
        speed=json.loads(speed.read_text()) if speed.is_file() else None,
        cache=pd.read_parquet(cache) if cache.is_file() else None,
    )
