"""AWQ: folded scales leave the model's outputs unchanged, and are chosen to reduce the errors of quantization.

Models run in MNN's engine; inputs of layers are random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hf2mnn.core.errors import QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.evaluation.layers import GraphInputs, run_mnn
from hf2mnn.families import get_family
from hf2mnn.families.base import Fold
from hf2mnn.metrics import relative_error
from hf2mnn.mnn.ask import ask_bundle
from hf2mnn.mnn.bundle import PARTS, EngineSettings
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.onnx.session import causal_mask
from hf2mnn.quant import write
from hf2mnn.quant.awq import search_fold
from hf2mnn.quant.folding import FOLDED, FoldedWeights, Scales, folded_tap_points
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.layer_inputs import Activations
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.variant import Choice, Part
from hf2mnn.quant.weights import Operator, WeightFile, module_names, operators
from hf2mnn.quant.write import write_weights
from hf2mnn.reference.golden import ACTIVATIONS
from hf2mnn.stages.quantize import quantize

LAYER = "model.language_model.layers.0"
TOKENS = 9
ENGINE = EngineSettings(threads=1)


def facts_of(onnx_folder: Path) -> tuple[dict[str, Any], list[Fold]]:
    model = json.loads((onnx_folder / "model.json").read_text())
    return model, get_family(model["model_type"], onnx_folder).folds(model)


def random_scales(folds: list[Fold], onnx_folder: Path, graphs: Path, part: str) -> Scales:
    """Return random scales from 1/7 to 7 for every fold of a part."""
    random, scales = np.random.default_rng(0), Scales()
    known = {operator.name: operator for operator in Part(part, onnx_folder, graphs).operators}
    for fold in folds:
        if fold.balance_layers[0] in known:
            channels = known[fold.balance_layers[0]].inputs // fold.repeats
            scales.add(fold, np.exp(random.uniform(-2, 2, channels)).astype(np.float32))
    return scales


def folded(onnx_folder: Path, graphs: Path, bundle: Path, folder: Path, name: str, bits: int, scales: Scales) -> Path:
    """Copy a bundle with scales folded into the float weights of one part."""
    part = Part(name, onnx_folder, graphs)
    shutil.copytree(bundle, folder)
    path = folder / f"{part.file}.weight"
    path.unlink()
    formats = {operator.name: WeightFormat(bits) for operator in part.operators}
    weights = FoldedWeights(part.weights, scales)
    graph, _ = write_weights(part.graph, part.operators, weights, path, formats, Methods(), 1, name)
    write_graph(graph, folder / part.file)
    save_file(scales.tap_points(facts_of(onnx_folder)[1]), folder / FOLDED)
    return folder


def run_part(bundle: Path, onnx_folder: Path, name: str, points: list[str]) -> dict[str, np.ndarray]:
    """Return values of tap points for random inputs, with folded scales removed."""
    model, random = facts_of(onnx_folder)[0], np.random.default_rng(1)
    if name == "decoder":
        embeds = random.standard_normal((TOKENS, 1, model["hidden_size"])).astype(np.float32)
        positions = np.tile(np.arange(TOKENS, dtype=np.int32), (3, 1))
        given = {"input_ids": embeds, "attention_mask": causal_mask(0, TOKENS), "position_ids": positions}
        given["logits_index"] = np.array([0], np.int32)
    else:
        pixels = random.standard_normal((16, 3 * 2 * 14 * 14)).astype(np.float32)
        given = get_family(model["model_type"], bundle).vision_inputs(pixels, np.array([1, 4, 4]), model)
    graph = read_graph(bundle / PARTS[name][0])
    (values,) = run_mnn(bundle, [GraphInputs("", name, {}, given)], {name: graph}, {name: points}, 1, 60)
    return values


def check_unchanged(onnx_folder: Path, bundle: Path, scaled: Path, name: str, points: list[str], bound: float) -> None:
    expected = run_part(bundle, onnx_folder, name, points)
    values = run_part(scaled, onnx_folder, name, points)
    for point in points:
        assert expected[point].std() > 1e-3, point
        assert relative_error(expected[point], values[point]) < bound, point


# Unchanged outputs


def fold_tap_points(folds: list[Fold], scales: Scales) -> list[str]:
    """Return the tap points between the layers of each fold, and the outputs of its balance layers."""
    inside = [fold for fold in folds if fold.smooth_layer in scales.rows]
    return sorted({point for fold in inside for point in (fold.smooth_layer, *fold.tap_points, *fold.balance_layers)})


@pytest.mark.parametrize(("bits", "bound"), [(32, 1e-5), (16, 3e-3)])
def test_a_folded_decoder_computes_the_same(
    onnx_folder: Path,
    graphs: Path,
    bundle: Path,
    tmp_path: Path,
    bits: int,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folds at normalizations, at values with biases and two query heads each, and in the MLP.

    'hf2mnn diagnose' corrects scaled tap points by the file in the bundle.
    """
    # Chunks of eight rows, as of a large weight.
    monkeypatch.setattr(write, "WEIGHTS_AT_ONCE", 1)
    folds = facts_of(onnx_folder)[1]
    scales = random_scales(folds, onnx_folder, graphs, "decoder")
    assert len(scales.rows) == 4 * 2
    scaled = folded(onnx_folder, graphs, bundle, tmp_path / "folded", "decoder", bits, scales)
    points = [point for point in fold_tap_points(folds, scales) if not point.endswith("norm")]
    check_unchanged(onnx_folder, bundle, scaled, "decoder", ["logits", *points], bound)
    saved = folded_tap_points(scaled)
    assert set(saved) == set(scales.rows) | {f"model.language_model.layers.{i}.self_attn.context" for i in range(2)}
    assert saved[f"{LAYER}.self_attn.context"].shape == (128,)


def test_a_folded_vision_tower_computes_the_same(onnx_folder: Path, graphs: Path, bundle: Path, tmp_path: Path) -> None:
    """Its normalizations have a beta, which is divided too."""
    folds = facts_of(onnx_folder)[1]
    scales = random_scales(folds, onnx_folder, graphs, "vision")
    assert len(scales.rows) == 2
    scaled = folded(onnx_folder, graphs, bundle, tmp_path / "folded", "vision", 32, scales)
    balance = ["model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.mlp.fc1"]
    check_unchanged(onnx_folder, bundle, scaled, "vision", ["image_embeds", *balance], 1e-5)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_values_with_one_or_many_query_heads(
    model_with_heads: Callable[[int], Path], tmp_path: Path, kv_heads: int
) -> None:
    """Grouped queries: each head of values is repeated for its heads of queries."""
    model = model_with_heads(kv_heads)
    onnx_folder, graphs, bundle = (model / name for name in ("onnx", "float-graphs", "float"))
    scales = random_scales(facts_of(onnx_folder)[1], onnx_folder, graphs, "decoder")
    assert scales.rows[f"{LAYER}.self_attn.v_proj"].shape == (32 * kv_heads,)
    assert scales.columns[f"{LAYER}.self_attn.o_proj"].shape == (128,)
    scaled = folded(onnx_folder, graphs, bundle, tmp_path / "folded", "decoder", 32, scales)
    points = ["logits", f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn.context", f"{LAYER}.self_attn.v_proj"]
    check_unchanged(onnx_folder, bundle, scaled, "decoder", points, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_reduce_inverts_expand(groups: int) -> None:
    fold = Fold("smooth", ("balance",), (), groups, 4)
    scales = np.arange(1, 13, dtype=np.float32)
    expanded = fold.expand(scales)
    heads = [scales[head * 4 : head * 4 + 4] for head in range(3) for _ in range(groups)]
    assert expanded.tolist() == np.concatenate(heads).tolist()
    assert fold.reduce(expanded).tolist() == scales.tolist()


# The search


def write_activations(folder: Path, tensors: dict[str, np.ndarray], inputs: dict[str, str]) -> Path:
    """Write a folder of the calibrate stage: rows of inputs by tensor, and the tensor of each layer."""
    folder.mkdir(parents=True)
    stored = {name: rows.astype(ml_dtypes.bfloat16) for name, rows in tensors.items()}
    save_file(stored, folder / ACTIVATIONS, metadata={"readers": json.dumps(inputs)})
    Manifest("calibrate", {}, {}, {}).save(folder)
    return folder


def rows_with_outliers(inputs: int, rows: int = 600, seed: int = 3) -> np.ndarray:
    """Return rows of inputs with a few channels thirty times as large as the others, as in hidden states."""
    random = np.random.default_rng([seed, inputs])
    values = random.standard_normal((rows, inputs))
    values[:, random.permutation(inputs)[: inputs // 40 + 1]] *= 30
    return values


def output_error(weight: np.ndarray, restored: np.ndarray, rows: np.ndarray) -> float:
    return relative_error(rows @ weight.T.astype(np.float64), rows @ restored.T.astype(np.float64))


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 64, False), (3, 32, False), (4, 0, True)])
def test_large_inputs_have_smaller_output_errors(tmp_path: Path, bits: int, block: int, symmetric: bool) -> None:
    """Than with mse, both without importance and with that of the inputs."""
    inputs, form = 128, WeightFormat(bits, block, symmetric, method="awq")
    rows = rows_with_outliers(inputs)
    folder = write_activations(tmp_path / "activations", {"a": rows}, {"a": "a", "b": "a"})
    activations = Activations(folder)
    random = np.random.default_rng(4)
    weights = {name: random.standard_t(5, (96, inputs)).astype(np.float32) for name in "ab"}
    layers = [(Operator(name, 96, inputs, 1, (), None), weight, form) for name, weight in weights.items()]
    scales = search_fold(Fold("norm", ("a", "b")), layers, activations)
    assert scales.dtype == np.float32 and scales.shape == (inputs,) and (scales > 0).all()
    methods = Methods(folder)
    methods.awq.scales.add(Fold("norm", ("a", "b")), scales)
    for operator, weight, _ in layers:
        restored = methods.prepare(operator, form)(0, weight * scales).dequantize() / scales
        shape = (bits, block, symmetric, 16)
        squares = np.square(activations.rows("a")).mean(axis=0)
        plain = round_rows(weight, WeightFormat(*shape, "mse")).dequantize()
        weighted = round_rows(weight, WeightFormat(*shape, "mse"), squares).dequantize()
        error = output_error(weight, restored, rows)
        assert error < 0.8 * output_error(weight, plain, rows)
        assert error < output_error(weight, weighted, rows)


def test_unused_inputs_have_no_scales(tmp_path: Path) -> None:
    folder = write_activations(tmp_path / "activations", {"a": np.zeros((10, 64))}, {"a": "a"})
    weight = np.ones((8, 64), np.float32)
    layer = (Operator("a", 8, 64, 1, (), None), weight, WeightFormat(4, 32, method="awq"))
    assert search_fold(Fold("norm", ("a",)), [layer], Activations(folder)) is None


# The stage


@pytest.fixture(scope="module")
def activations(onnx_folder: Path, graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of every layer of both parts; layers with the same input share a tensor."""
    tensors, inputs, folds = {}, {}, facts_of(onnx_folder)[1]
    shared = {layer: fold.balance_layers[0] for fold in folds for layer in fold.balance_layers}
    for part in PARTS:
        for seed, operator in enumerate(Part(part, onnx_folder, graphs).operators):
            if operator.kernel == 1:
                inputs[operator.name] = shared.get(operator.name, operator.name)
                rows = rows_with_outliers(operator.inputs, seed=seed)
                rows[:, 1:] += 0.7 * rows[:, :-1]
                tensors.setdefault(inputs[operator.name], rows)
    return write_activations(tmp_path_factory.mktemp("recorded") / "activations", tensors, inputs)


@pytest.fixture(scope="module")
def variants(onnx_folder: Path, graphs: Path, activations: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("variants")
    bundles = {}
    for method in ("mse", "awq", "gptq"):
        form = WeightFormat(3, 32, method=method)
        bundles[method] = quantize(onnx_folder, graphs, folder / method, Choice(form, form, ENGINE), 2, activations)
    return bundles


def read(bundle: Path, onnx_folder: Path, part: str) -> tuple[list[Operator], WeightFile]:
    graph = read_graph(bundle / PARTS[part][0])
    file = WeightFile(graph, bundle / f"{PARTS[part][0]}.weight")
    return operators(graph, module_names(onnx_folder / PARTS[part][1])), file


@pytest.mark.parametrize("part", PARTS)
def test_calibrated_methods_have_smaller_output_errors(
    variants: dict[str, Path], bundle: Path, onnx_folder: Path, activations: Path, part: str
) -> None:
    """Of all layers, for the recorded inputs and with folded scales removed."""
    recorded = Activations(activations)
    floats, weights = read(bundle, onnx_folder, part)
    folds = {layer: fold for fold in facts_of(onnx_folder)[1] for layer in fold.balance_layers}
    errors: dict[str, list[float]] = {}
    for method, variant in variants.items():
        points, (layers, file) = folded_tap_points(variant), read(variant, onnx_folder, part)
        for source, operator in zip(floats, layers, strict=True):
            if operator.kernel > 1:
                continue
            rows = file.rows(operator)
            fold = folds.get(operator.name)
            if fold and fold.smooth_layer in points:
                rows = rows / fold.expand(points[fold.smooth_layer])
            if operator.name in points:
                rows = rows * points[operator.name][:, None]
            error = output_error(weights.rows(source), rows, recorded.rows(operator.name))
            errors.setdefault(method, []).append(error)
    assert len(errors["mse"]) == (15 if part == "decoder" else 6)
    assert (np.array(errors["gptq"]) < 0.8 * np.array(errors["mse"])).all()
    assert np.mean(errors["awq"]) < 0.8 * np.mean(errors["mse"])


def test_folded_scales_are_in_the_bundle(variants: dict[str, Path], onnx_folder: Path) -> None:
    """And in its manifest; the engine answers."""
    assert [method for method, variant in variants.items() if (variant / FOLDED).exists()] == ["awq"]
    smooth = {fold.smooth_layer for fold in facts_of(onnx_folder)[1]}
    assert smooth & set(folded_tap_points(variants["awq"])) >= {f"{LAYER}.input_layernorm", f"{LAYER}.mlp.up_proj"}
    for variant in variants.values():
        assert Manifest.load(variant).verify() == variant
        assert set(Manifest.load(variant).inputs) == {"onnx", "graphs", "calibration"}
        assert ask_bundle(variant, "What?", [], 4)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_number_of_threads_changes_no_byte(
    variants: dict[str, Path], onnx_folder: Path, graphs: Path, activations: Path, tmp_path: Path, method: str
) -> None:
    form = WeightFormat(3, 32, method=method)
    for threads in (1, 4):
        again = quantize(onnx_folder, graphs, tmp_path / f"{threads}", Choice(form, form, ENGINE), threads, activations)
        for path in variants[method].iterdir():
            if path.name != "manifest.json":
                assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_folds_of_both_parts_are_stored(variants: dict[str, Path]) -> None:
    """One file for the decoder's scales and the vision tower's."""
    points = folded_tap_points(variants["awq"])
    assert any(point.startswith("model.visual.") for point in points)
    assert any(point.startswith("model.language_model.") for point in points)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_layer_without_recorded_inputs(onnx_folder: Path, graphs: Path, tmp_path: Path, method: str) -> None:
    name = f"{LAYER}.self_attn.q_proj"
    folder = write_activations(tmp_path / "activations", {name: np.ones((4, 128))}, {name: name})
    form = WeightFormat(4, 32, method=method)
    with pytest.raises(QuantizationError, match=r"no activations of model\.language_model\.layers\.0"):
        quantize(onnx_folder, graphs, tmp_path / "variant", Choice(form, WeightFormat(), ENGINE), 1, folder)
    assert not (tmp_path / "variant").exists()


def test_recorded_inputs_that_are_not_finite(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    name = "lm_head"
    folder = write_activations(tmp_path / "activations", {name: np.full((4, 128), np.nan)}, {name: name})
    for method in ("gptq", "awq"):
        plan = {"decoder": {name: {"bits": 4, "block": 32, "method": method}}}
        choice = Choice(WeightFormat(), WeightFormat(), ENGINE, plan)
        with pytest.raises(QuantizationError, match=rf"^{name}: .*NaN"):
            quantize(onnx_folder, graphs, tmp_path / method, choice, 1, folder)
        assert not (tmp_path / method).exists()
