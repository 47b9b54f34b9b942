"""Evidence: everything that the stages measured about one model, read from manifests and files of results/<model>."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf2mnn.core.errors import ManifestError
from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation import findings as files

REFERENCE_FOLDER, BENCHMARK = "reference/evaluation", "benchmark"
PLANS, BUNDLES, EVALUATION, DIAGNOSIS = "plans", "bundles", "evaluation", "diagnosis"
MODEL_FOLDERS = ("checkpoint", "examples/evaluation", "examples/calibration", REFERENCE_FOLDER, "reference/calibration")
MODEL_FOLDERS += ("onnx", "graphs", "calibration", "sensitivity")
"""Folders that all variants share, in the order of the pipeline; `benchmark` comes after those of the variants."""
VARIANT_FOLDERS = (PLANS, BUNDLES, EVALUATION, DIAGNOSIS)
"""Folders that hold a folder for each variant, in the order of the pipeline."""


@dataclass(frozen=True)
class VariantEvidence:
    """Measurements of one variant, or of "onnxruntime", which has neither a diagnosis nor a bundle."""

    name: str
    summary: dict[str, Any]  # Figures of `hf2mnn.evaluation.score.Scores` over the whole set, by name.
    figures: pd.DataFrame  # All figures with their confidence intervals, by group of examples.
    answers: pd.DataFrame  # One row for each example.
    parity: pd.DataFrame  # One row for each way of filling the KV cache.
    layers: pd.DataFrame | None  # A row for each tap point (`hf2mnn.evaluation.layers`); None without a diagnosis.
    budget: pd.DataFrame | None  # Mean KL divergence by source of error; None without a diagnosis.
    findings: list[dict[str, Any]]  # Named causes (`hf2mnn.evaluation.findings.Finding`) as dictionaries.
    manifests: dict[str, Manifest]  # By folder, see VARIANT_FOLDERS.

    def group(self, group: str) -> pd.DataFrame:
        """Return the figures of a group of examples, indexed by name; "all" is the whole set."""
        return self.figures[self.figures["group"] == group].set_index("figure")


@dataclass(frozen=True)
class Evidence:
    """Measurements of one model."""

    model: str
    folder: Path  # results/<model>
    variants: list[VariantEvidence]  # In the order of the table.
    manifests: dict[str, Manifest]  # By folder, see MODEL_FOLDERS.
    speed: dict[str, Any] | None  # Contents of benchmark.json; None without a benchmark.
    cache: pd.DataFrame | None  # Speed-up by the KV cache for each bundle and length; None without a benchmark.

    @property
    def reference(self) -> Path:
        """Folder of the reference on the evaluation set."""
        return self.folder / REFERENCE_FOLDER

    def stage_folders(self) -> dict[str, Manifest]:
        """Return the manifests of all stage folders by path below `folder`, in the order of the pipeline."""
        manifests = {path: self.manifests.get(path) for path in MODEL_FOLDERS}
        for folder in VARIANT_FOLDERS:
            manifests |= {f"{folder}/{variant.name}": variant.manifests.get(folder) for variant in self.variants}
        manifests[BENCHMARK] = self.manifests.get(BENCHMARK)
        return {path: manifest for path, manifest in manifests.items() if manifest}


def _verified(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    manifest.verify()
    return manifest


def read_variant(folder: Path, name: str) -> VariantEvidence:
    """Read the evidence of one variant from results/<model>."""
    plan, bundle, evaluation, diagnosis = (folder / part / name for part in VARIANT_FOLDERS)
    manifests = {path.parent.name: Manifest.load(path) for path in (plan, bundle) if path.is_dir()}
    if BUNDLES in manifests:
        manifests[BUNDLES].accept_edits()
    manifests[EVALUATION] = _verified(evaluation)
    summary = json.loads((evaluation / files.SUMMARY).read_text())
    figures, answers, parity = (pd.read_parquet(evaluation / t) for t in (files.FIGURES, files.ANSWERS, files.PARITY))
    layers, budget, findings = None, None, []
    if diagnosis.is_dir():
        manifests[DIAGNOSIS] = _verified(diagnosis)
        layers, budget = (pd.read_parquet(diagnosis / t) for t in (files.LAYERS, files.BUDGET))
        findings = json.loads((diagnosis / files.FINDINGS).read_text())
    findings += [asdict(finding) for finding in files.wrong_rendering(answers) + files.wrong_cache(parity)]
    return VariantEvidence(name, summary, figures, answers, parity, layers, budget, findings, manifests)


def read_evidence(model: str, folder: Path, names: list[str]) -> Evidence:
    """Read results/<model>, with variants in the order of `names`; raise ManifestError for missing or changed files."""
    manifests = {name: Manifest.load(folder / name) for name in MODEL_FOLDERS if (folder / name).is_dir()}
    manifests[REFERENCE_FOLDER] = _verified(folder / REFERENCE_FOLDER)
    speed, cache = folder / BENCHMARK / "benchmark.json", folder / BENCHMARK / "cache.parquet"
    if speed.is_file():
        manifests[BENCHMARK] = _verified(folder / BENCHMARK)
    timed = json.loads(speed.read_text()) if speed.is_file() else None
    speedups = pd.read_parquet(cache) if cache.is_file() else None
    return Evidence(model, folder, [read_variant(folder, name) for name in names], manifests, timed, speedups)


def check_inputs(evidence: Evidence) -> None:
    """Raise ManifestError unless all stages of a model used the same reference and bundles."""
    reference = evidence.manifests[REFERENCE_FOLDER].digest()
    benchmark = evidence.manifests.get(BENCHMARK, Manifest("benchmark"))
    for variant in evidence.variants:
        measured = [variant.manifests[folder] for folder in (EVALUATION, DIAGNOSIS) if folder in variant.manifests]
        for manifest in measured:
            if manifest.inputs.get("reference") != reference:
                problem = f"{manifest.folder} was measured against another reference than {evidence.reference}"
                raise ManifestError(f"{problem}; run 'hf2mnn {manifest.stage}' again")
        if len({manifest.inputs.get("bundle") for manifest in measured}) > 1:
            raise ManifestError(f"evaluation and diagnosis of {variant.name} used different bundles; run both again")
        if (bundle := variant.manifests.get(BUNDLES)) is None:
            continue
        digest = bundle.digest()
        if variant.manifests[EVALUATION].inputs.get("bundle") != digest:
            raise ManifestError(f"{bundle.folder} is newer than its evaluation; run 'hf2mnn evaluate' again")
        if benchmark.inputs.get(variant.name, digest) != digest:
            problem = f"{benchmark.folder} timed another bundle than {bundle.folder}"
            raise ManifestError(f"{problem}; run 'hf2mnn benchmark' again")
