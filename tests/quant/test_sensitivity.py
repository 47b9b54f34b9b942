"""Sensitivity: the divergence of the answers when one operator alone is quantized, and plans made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf2mnn.config.budget import parse_budget
from hf2mnn.config.plan import load_plan
from hf2mnn.core.errors import QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.quant.formats import CANDIDATES, MEASURED, WeightFormat
from hf2mnn.quant.sensitivity import SensitivityMeter, requantize
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.convert import run as convert_graphs
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.plan import run as make_plan
from hf2mnn.stages.quantize import quantize
from hf2mnn.stages.reference import run as run_reference
from hf2mnn.stages.sensitivity import run as measure_sensitivity
from support import SHAPES_VL

EXAMPLES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of the embedded model up to calibration, with a few examples; tests only add to it."""
    folder = tmp_path_factory.mktemp("sensitivity")
    fetch_checkpoint(folder / "checkpoint", SHAPES_VL)
    export_onnx(folder / "checkpoint", folder / "onnx")
    convert_graphs(folder / "onnx", folder / "graphs")
    few = folder / "few"
    few.mkdir()
    lines = (SHAPES_VL / "calibration" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    (few / "examples.jsonl").write_text("\n".join(lines[:: len(lines) // 12]), encoding="utf-8")
    (few / "images").symlink_to(SHAPES_VL / "calibration" / "images")
    run_reference(folder / "checkpoint", few, folder / "calibration", max_new_tokens=16, threads=1)
    return folder


@pytest.fixture(scope="module")
def meter(folder: Path) -> SensitivityMeter:
    return SensitivityMeter(folder / "checkpoint", folder / "calibration", EXAMPLES)


@pytest.fixture(scope="module")
def sensitivity(folder: Path) -> Path:
    stages = folder / "checkpoint", folder / "calibration"
    return measure_sensitivity(*stages, folder / "sensitivity", [3, 4], EXAMPLES, 1)


def test_the_decoder_alone_has_the_predictions_of_the_whole_model(meter: SensitivityMeter) -> None:
    """Its inputs are kept, so that the vision tower does not run for each of its operators."""
    assert any(example.images for example in meter.examples)
    for index in range(len(meter.examples)):
        whole = meter.predict(index, whole=True)
        np.testing.assert_allclose(meter.predictions[index], whole, atol=1e-4)
        np.testing.assert_allclose(whole, meter.examples[index].logits, atol=1e-3)


def test_every_weight_is_measured_and_restored(meter: SensitivityMeter) -> None:
    before = {name: value.clone() for name, value in meter.reference.model.state_dict().items()}
    names = [layer.name for layer in meter.layers]
    assert len(names) == len(set(names)) == 41  # 29 of the decoder, 11 of the vision tower, the embedding
    for layer in meter.layers[:3] + meter.layers[-3:]:
        meter.divergence(layer, 2)
    for name, value in meter.reference.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_divergence_is_that_of_the_answers_with_this_weight_quantized(meter: SensitivityMeter) -> None:
    """Computed here from the whole model with the weight replaced."""
    (layer,) = [layer for layer in meter.layers if layer.name.endswith("layers.2.mlp.down_proj")]
    divergence, error = meter.divergence(layer, 3)
    quantized = requantize(layer.rows, 3, 64)
    assert error == pytest.approx(np.linalg.norm(quantized - layer.rows) / np.linalg.norm(layer.rows))
    layer.module.weight.data, original = torch.from_numpy(quantized), layer.module.weight.data
    predictions = [meter.predict(index, whole=True) for index in range(len(meter.examples))]
    layer.module.weight.data = original
    pairs = zip(meter.predictions, predictions, strict=True)
    expected = np.concatenate([kl_divergence(p, q) for p, q in pairs]).mean()
    assert divergence == pytest.approx(expected, rel=1e-3)
    assert divergence > 1e-8


def test_lm_head_and_the_embedding_are_separate_although_they_are_one_parameter(meter: SensitivityMeter) -> None:
    named = {layer.name: layer for layer in meter.layers}
    embedding, _ = meter.divergence(named["embedding"], 2)
    head, _ = meter.divergence(named["lm_head"], 2)
    assert embedding > 0
    assert head > 0
    assert embedding != head


def test_the_tables_have_every_operator_and_every_format(sensitivity: Path) -> None:
    measured, candidates = (pd.read_csv(sensitivity / name) for name in (MEASURED, CANDIDATES))
    assert len(measured) == 2 * 41
    assert (measured["mean_kld"] >= 0).all()
    sums = measured.groupby("bits")["mean_kld"].sum()
    assert sums[3] > 2 * sums[4]
    q = candidates[candidates["operator"] == "model.language_model.layers.0.self_attn.q_proj"]
    assert set(zip(q["bits"], q["block"], strict=True)) == {(b, k) for b in range(2, 9) for k in (32, 64, 128, 0)}
    patch = candidates[candidates["operator"] == "model.visual.patch_embed.proj"]
    assert set(patch["block"]) == {0}
    wide = candidates[candidates["operator"] == "model.visual.blocks.0.attn.qkv"]
    assert set(wide["block"]) == {32, 64, 0}, "128 does not divide 192"


def test_mapped_weights_give_the_same_tables(folder: Path, sensitivity: Path, tmp_path: Path) -> None:
    stages = folder / "checkpoint", folder / "calibration"
    mapped = measure_sensitivity(*stages, tmp_path / "mapped", [3, 4], EXAMPLES, 1, "mapped")
    assert Manifest.load(mapped).outputs == Manifest.load(sensitivity).outputs
    assert [Manifest.load(folder).results["weights"] for folder in (mapped, sensitivity)] == ["mapped", "resident"]


@pytest.mark.parametrize(
    ("budget", "embedding"),
    [
        ("4.25", "file"),
        ("3MB", "lm_head"),
        ("4MB", "file"),
    ],
)
def test_a_bundle_of_a_plan_is_within_the_budget(
    folder: Path, sensitivity: Path, budget: str, embedding: str, tmp_path: Path
) -> None:
    """With graphs, embedding, tokenizer and all other files but the manifest."""
    plan = make_plan(sensitivity, folder / "onnx", folder / "graphs", tmp_path / "plan", budget, embedding)
    chosen = load_plan(plan / "plan.yaml").model_dump(exclude_none=True)
    base = WeightFormat(8, method="mse")
    choice = Choice(base, base, EngineSettings("low", "low"), chosen, embedding)
    bundle = quantize(folder / "onnx", folder / "graphs", tmp_path / "bundle", choice, 2)
    results = json.loads((bundle / "manifest.json").read_text())["results"]
    planned = json.loads((plan / "manifest.json").read_text())["results"]
    assert results["weight_bytes"] == planned["weight_bytes"]
    if bits := parse_budget(budget).bits_per_weight:
        assert bits - 0.05 < results["bits_per_weight"] <= bits
    else:
        size = sum(path.stat().st_size for path in bundle.iterdir() if path.name != "manifest.json")
        assert 0.98 * parse_budget(budget).bundle_bytes < size <= parse_budget(budget).bundle_bytes


def test_the_error_of_a_small_budget_has_the_smallest_possible_one(
    folder: Path, sensitivity: Path, tmp_path: Path
) -> None:
    stages = sensitivity, folder / "onnx", folder / "graphs", tmp_path / "plan"
    with pytest.raises(QuantizationError, match=r"give at least \d\.\d+ bits a weight"):
        make_plan(*stages, "1.5")
    with pytest.raises(QuantizationError, match=r"the budget leaves"):
        make_plan(*stages, "1MB")
    assert not (tmp_path / "plan").exists()
