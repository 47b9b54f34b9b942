"""Evidence: everything that the stages measured about one model, read from results/<model>.

The report reads manifests of all stages and the files of reference/evaluation, evaluation/<variant>,
diagnosis/<variant> and benchmark. It computes no figure and starts no process.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation.findings import (
    ANSWERS,
    BUDGET,
    FIGURES,
    FINDINGS,
    LAYERS,
    PARITY,
    POSITIONS,
    SUMMARY,
    wrong_cache,
    wrong_rendering,
)

REFERENCE_FOLDER, BENCHMARK = "reference/evaluation", "benchmark"
PLANS, BUNDLES, EVALUATION, DIAGNOSIS = "plans", "bundles", "evaluation", "diagnosis"
MODEL_FOLDERS = (
    *("checkpoint", "examples/evaluation", "examples/calibration", REFERENCE_FOLDER, "reference/calibration"),
    *("onnx", "graphs", "calibration", "sensitivity"),
)
"""Folders that all variants share, in the order of the pipeline; `benchmark` comes after those of the variants."""
VARIANT_FOLDERS = (PLANS, BUNDLES, EVALUATION, DIAGNOSIS)
"""Folders that hold a folder for each variant, in the order of the pipeline."""


@dataclass(frozen=True)
class VariantEvidence:
    """Measurements of one variant, or of "onnxruntime", which has neither a diagnosis nor a bundle.

    Attributes:
        name: Name of the variant.
        summary: Figures of `hf2mnn.evaluation.score.Scores` over the whole set, by name.
        figures: All figures with their confidence intervals, by group of examples.
        answers: One row for each example.
        positions: One row for each token position.
        parity: One row for each way of filling the KV cache.
        layers: One row for each tap point (`hf2mnn.evaluation.layers.COLUMNS`); None without a diagnosis.
        budget: Mean KL divergence by source of error; None without a diagnosis.
        findings: Named causes (`hf2mnn.evaluation.findings.Finding`) as dictionaries.
        manifests: Manifests by folder, see VARIANT_FOLDERS.
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

    def whole_set(self) -> pd.DataFrame:
        """Return the figures over the whole set, indexed by name."""
        return self.group("all")

    def group(self, group: str) -> pd.DataFrame:
        """Return the figures of a group of examples, indexed by name."""
        return self.figures[self.figures["group"] == group].set_index("figure")


@dataclass(frozen=True)
class Evidence:
    """Measurements of one model.

    Attributes:
        model: Name of the model.
        folder: results/<model>.
        variants: Variants in the order of the table.
        manifests: Manifests by folder, see MODEL_FOLDERS.
        speed: Contents of benchmark.json; None without a benchmark.
        cache: Speed-up by the KV cache for each bundle and length; None without a benchmark.
    """

    model: str
    folder: Path
    variants: list[VariantEvidence]
    manifests: dict[str, Manifest]
    speed: dict[str, Any] | None
    cache: pd.DataFrame | None

    @property
    def reference(self) -> Path:
        """Folder of the reference on the evaluation set."""
        return self.folder / REFERENCE_FOLDER


def _verified(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    manifest.verify()
    return manifest


def read_variant(folder: Path, name: str) -> VariantEvidence:
    """Read the evidence of one variant from results/<model>.

    Raises:
        ManifestError: The evaluation is missing, or files differ from their manifest.
    """
    paths = {part: folder / part / name for part in VARIANT_FOLDERS}
    manifests = {part: Manifest.load(paths[part]) for part in (PLANS, BUNDLES) if paths[part].is_dir()}
    manifests[EVALUATION] = _verified(paths[EVALUATION])
    diagnosed = paths[DIAGNOSIS].is_dir()
    if diagnosed:
        manifests[DIAGNOSIS] = _verified(paths[DIAGNOSIS])
    tables = {table: pd.read_parquet(paths[EVALUATION] / table) for table in (FIGURES, ANSWERS, POSITIONS, PARITY)}
    findings = json.loads((paths[DIAGNOSIS] / FINDINGS).read_text()) if diagnosed else []
    findings += [asdict(finding) for finding in [*wrong_rendering(tables[ANSWERS]), *wrong_cache(tables[PARITY])]]
    return VariantEvidence(
        name=name,
        summary=json.loads((paths[EVALUATION] / SUMMARY).read_text()),
        figures=tables[FIGURES],
        answers=tables[ANSWERS],
        positions=tables[POSITIONS],
        parity=tables[PARITY],
        layers=pd.read_parquet(paths[DIAGNOSIS] / LAYERS) if diagnosed else None,
        budget=pd.read_parquet(paths[DIAGNOSIS] / BUDGET) if diagnosed else None,
        findings=findings,
        manifests=manifests,
    )


def read_evidence(model: str, folder: Path, names: list[str]) -> Evidence:
    """Read the evidence of a model.

    Args:
        model: Name of the model.
        folder: results/<model>.
        names: Variants in the order of the table.

    Raises:
        ManifestError: A stage is missing, or files differ from their manifest.
    """
    manifests = {name: Manifest.load(folder / name) for name in MODEL_FOLDERS if (folder / name).is_dir()}
    manifests[REFERENCE_FOLDER] = _verified(folder / REFERENCE_FOLDER)
    speed, cache = folder / BENCHMARK / "benchmark.json", folder / BENCHMARK / "cache.parquet"
    if speed.is_file():
        manifests[BENCHMARK] = _verified(folder / BENCHMARK)
    return Evidence(
        model=model,
        folder=folder,
        variants=[read_variant(folder, name) for name in names],
        manifests=manifests,
        speed=json.loads(speed.read_text()) if speed.is_file() else None,
        cache=pd.read_parquet(cache) if cache.is_file() else None,
    )
