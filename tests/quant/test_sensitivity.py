"""What it costs when one operator alone is quantized: measured on the answers, and on nothing but that operator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf2mnn.config.budget import Budget
from hf2mnn.config.plan import load_plan
from hf2mnn.core.errors import QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import EngineSettings
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.formats import CANDIDATES, MEASURED
from hf2mnn.quant.sensitivity import Bench
from hf2mnn.quant.variant import Choice
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.plan import run as make_plan
from hf2mnn.stages.quantize import run as quantize
from hf2mnn.stages.reference import run as run_reference
from hf2mnn.stages.sensitivity import run as measure_sensitivity
from support import SHAPES_VL, float_bundle

EXAMPLES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source, onnx, float and calibration of the embedded model, with a few examples. Tests only add to it."""
    folder = tmp_path_factory.mktemp("sensitivity")
    fetch_checkpoint(folder / "checkpoint", SHAPES_VL)
    export_onnx(folder / "checkpoint", folder / "onnx")
    float_bundle(folder / "onnx", folder / "float")
    few = folder / "few"
    few.mkdir()
    lines = (SHAPES_VL / "calibration" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    (few / "examples.jsonl").write_text("\n".join(lines[:: len(lines) // 12]), encoding="utf-8")
    (few / "images").symlink_to(SHAPES_VL / "calibration" / "images")
    run_reference(folder / "checkpoint", few, folder / "calibration", max_new_tokens=16, threads=1)
    return folder


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder / "checkpoint", folder / "calibration", EXAMPLES)


@pytest.fixture(scope="module")
def sensitivity(folder: Path) -> Path:
    stages = folder / "checkpoint", folder / "calibration"
    return measure_sensitivity(*stages, folder / "sensitivity", [3, 4], EXAMPLES, 1)


def test_the_decoder_alone_predicts_what_the_whole_model_does(bench: Bench) -> None:
    """What it is fed is kept, so that the vision tower need not run for each of its operators."""
    assert any(example.images for example in bench.examples)
    for index in range(len(bench.examples)):
        whole = bench._predict(index, whole=True)
        np.testing.assert_allclose(bench.right[index], whole, atol=1e-4)
        np.testing.assert_allclose(whole, bench.examples[index].logits, atol=1e-3)


def test_every_weight_is_measured_and_none_is_left_changed(bench: Bench) -> None:
    before = {name: value.clone() for name, value in bench.reference.model.state_dict().items()}
    names = [layer.name for layer in bench.layers]
    assert len(names) == len(set(names)) == 41  # 29 of the decoder, 11 of the vision tower, the embedding
    for layer in bench.layers[:3] + bench.layers[-3:]:
        bench.divergence(layer, 2)
    for name, value in bench.reference.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_divergence_is_that_of_the_answers_with_this_weight_rounded(bench: Bench) -> None:
    """By hand: replace the weight in a model of its own, read prompt and answer, compare."""
    (layer,) = [layer for layer in bench.layers if layer.name.endswith("layers.2.mlp.down_proj")]
    found, error = bench.divergence(layer, 3)
    rounded = layer.rounded(layer.rows, 3, 64)
    assert error == pytest.approx(np.linalg.norm(rounded - layer.rows) / np.linalg.norm(layer.rows))
    layer.module.weight.data, kept = torch.from_numpy(rounded), layer.module.weight.data
    predicted = [bench._predict(index, whole=True) for index in range(len(bench.examples))]
    layer.module.weight.data = kept
    by_hand = np.concatenate([kl_divergence(a, b) for a, b in zip(bench.right, predicted, strict=True)]).mean()
    assert found == pytest.approx(by_hand, rel=1e-3)
    assert found > 1e-8


def test_lm_head_and_the_embedding_are_told_apart_although_they_are_one_parameter(bench: Bench) -> None:
    named = {layer.name: layer for layer in bench.layers}
    embedding, _ = bench.divergence(named["embedding"], 2)
    head, _ = bench.divergence(named["lm_head"], 2)
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


def test_the_same_tables_with_weights_left_in_their_file(folder: Path, sensitivity: Path, tmp_path: Path) -> None:
    stages = folder / "checkpoint", folder / "calibration"
    mapped = measure_sensitivity(*stages, tmp_path / "mapped", [3, 4], EXAMPLES, 1, "mapped")
    assert Manifest.load(mapped).outputs == Manifest.load(sensitivity).outputs
    assert [Manifest.load(made).results["weights"] for made in (mapped, sensitivity)] == ["mapped", "resident"]


@pytest.mark.parametrize(
    ("budget", "embedding"),
    [
        (Budget(bits_per_weight=4.25), "file"),
        (Budget(bundle_bytes=3_000_000), "lm_head"),
        (Budget(None, 4_000_000), "file"),
    ],
)
def test_a_bundle_made_by_a_plan_keeps_the_budget(
    folder: Path, sensitivity: Path, budget: Budget, embedding: str, tmp_path: Path
) -> None:
    """All of it: graphs, embedding, tokenizer and what else is in the folder."""
    plan = make_plan(sensitivity, folder / "onnx", folder / "float", tmp_path / "plan", budget, embedding)
    chosen = load_plan(plan / "plan.yaml").model_dump(exclude_none=True)
    every = WeightFormat(8, method="mse")
    choice = Choice(every, every, EngineSettings("low", "low"), chosen, embedding)
    bundle = quantize(folder / "onnx", folder / "float", tmp_path / "bundle", choice, 2)
    results = json.loads((bundle / "manifest.json").read_text())["results"]
    promised = json.loads((plan / "manifest.json").read_text())["results"]
    assert results["weight_bytes"] == promised["weight_bytes"]
    if budget.bits_per_weight:
        assert budget.bits_per_weight - 0.05 < results["bits_per_weight"] <= budget.bits_per_weight
    else:
        size = sum(path.stat().st_size for path in bundle.iterdir() if path.name != "manifest.json")
        assert 0.98 * budget.bundle_bytes < size <= budget.bundle_bytes


def test_a_budget_too_small_names_the_smallest(folder: Path, sensitivity: Path, tmp_path: Path) -> None:
    stages = sensitivity, folder / "onnx", folder / "float", tmp_path / "plan"
    with pytest.raises(QuantizationError, match=r"give at least \d\.\d+ bits a weight"):
        make_plan(*stages, Budget(bits_per_weight=1.5), "file")
    with pytest.raises(QuantizationError, match=r"the budget leaves"):
        make_plan(*stages, Budget(bundle_bytes=1_000_000), "file")
    assert not (tmp_path / "plan").exists()
