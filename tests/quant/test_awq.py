"""Scales that are folded into neighbours change nothing that the model computes, and are chosen so that rounding does
less harm. Models are run in the real engine; what layers read is made up.
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
from hf2mnn.mnn.bundle import PARTS, EngineSettings, convert_decoder
from hf2mnn.mnn.convert import read_graph, write_graph
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.onnx.session import causal_mask
from hf2mnn.quant import write
from hf2mnn.quant.awq import fold_scales
from hf2mnn.quant.folding import FOLDED, FoldedWeights, Scales, folded_tap_points
from hf2mnn.quant.layer_inputs import Activations
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.weights import module_names
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.variant import Choice, Part
from hf2mnn.quant.weights import Operator, WeightFile, operators
from hf2mnn.quant.write import write_weights
from hf2mnn.reference.golden import ACTIVATIONS
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.quantize import run as quantize

LAYER = "model.language_model.layers.0"
TOKENS = 9
ENGINE = EngineSettings(threads=1)


def facts_of(onnx_folder: Path) -> tuple[dict[str, Any], list[Fold]]:
    model = json.loads((onnx_folder / "model.json").read_text())
    return model, get_family(model["model_type"], onnx_folder).folds(model)


def random_scales(folds: list[Fold], onnx_folder: Path, bundle: Path, part: str) -> Scales:
    """For every fold of a part, from a seventh to seven, each channel its own."""
    random, scales = np.random.default_rng(0), Scales()
    known = {operator.name: operator for operator in Part(part, onnx_folder, bundle).operators}
    for fold in folds:
        if fold.balance_layers[0] in known:
            channels = known[fold.balance_layers[0]].inputs // fold.repeats
            scales.add(fold, np.exp(random.uniform(-2, 2, channels)).astype(np.float32))
    return scales


def folded(onnx_folder: Path, bundle: Path, folder: Path, name: str, bits: int, scales: Scales) -> Path:
    """A copy of a bundle, one part of it with scales folded in and float weights."""
    part = Part(name, onnx_folder, bundle)
    shutil.copytree(bundle, folder)
    path = folder / f"{part.file}.weight"
    path.unlink()
    formats = {operator.name: WeightFormat(bits) for operator in part.operators}
    weights = FoldedWeights(part.weights, scales)
    graph, _ = write_weights(part.graph, part.operators, weights, path, formats, Methods(), 1, name)
    write_graph(graph, folder / part.file)
    save_file(scales.points(facts_of(onnx_folder)[1]), folder / FOLDED)
    return folder


def run_part(bundle: Path, onnx_folder: Path, name: str, points: list[str]) -> dict[str, np.ndarray]:
    """Values of points on made-up inputs, as the checkpoint has them."""
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


def unchanged(onnx_folder: Path, bundle: Path, made: Path, name: str, points: list[str], bound: float) -> None:
    wanted = run_part(bundle, onnx_folder, name, points)
    found = run_part(made, onnx_folder, name, points)
    for point in points:
        assert wanted[point].std() > 1e-3, point
        assert relative_error(wanted[point], found[point]) < bound, point


# The same model


def points_of(folds: list[Fold], scales: Scales) -> list[str]:
    """Where scales are folded out and in again, and what reads them."""
    inside = [fold for fold in folds if fold.smooth_layer in scales.rows]
    return sorted({point for fold in inside for point in (fold.smooth_layer, *fold.tap_points, *fold.balance_layers)})


@pytest.mark.parametrize(("bits", "bound"), [(32, 1e-5), (16, 3e-3)])
def test_a_folded_decoder_computes_the_same(
    onnx_folder: Path, bundle: Path, tmp_path: Path, bits: int, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalizations, values with their biases seen by two heads each, and the two branches of an MLP. What
    'hf2mnn diagnose' reads at a point that is scaled is set right by the file in the bundle.
    """
    # Eight rows at a time, as a large weight is cut.
    monkeypatch.setattr(write, "WEIGHTS_AT_ONCE", 1)
    folds = facts_of(onnx_folder)[1]
    scales = random_scales(folds, onnx_folder, bundle, "decoder")
    assert len(scales.rows) == 4 * 2
    made = folded(onnx_folder, bundle, tmp_path / "folded", "decoder", bits, scales)
    points = [point for point in points_of(folds, scales) if not point.endswith("norm")]
    unchanged(onnx_folder, bundle, made, "decoder", ["logits", *points], bound)
    saved = folded_tap_points(made)
    assert set(saved) == set(scales.rows) | {f"model.language_model.layers.{i}.self_attn.context" for i in range(2)}
    assert saved[f"{LAYER}.self_attn.context"].shape == (128,)


def test_a_folded_vision_tower_computes_the_same(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    """Its normalizations have a beta, which is divided as well."""
    folds = facts_of(onnx_folder)[1]
    scales = random_scales(folds, onnx_folder, bundle, "vision")
    assert len(scales.rows) == 2
    made = folded(onnx_folder, bundle, tmp_path / "folded", "vision", 32, scales)
    readers = ["model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.mlp.fc1"]
    unchanged(onnx_folder, bundle, made, "vision", ["image_embeds", *readers], 1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1)])
def test_values_that_one_or_many_heads_see(
    make_checkpoint: Callable[..., Path], tmp_path: Path, heads: int, kv_heads: int
) -> None:
    """Grouped queries: a head of values is repeated for each head of queries, one after the other."""
    size = 128 // heads
    text = {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_parameters": {
            "mrope_section": [size // 2 - 2 * (size // 6), size // 6, size // 6],
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
    }
    checkpoint = make_checkpoint(text=text, vision={"depth": 1, "embed_dim": 96, "num_heads": 3})
    onnx_folder = export_onnx(fetch_checkpoint(tmp_path / "checkpoint", checkpoint), tmp_path / "onnx")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    convert_decoder(onnx_folder, bundle, 1, WeightFormat())
    (bundle / "config.json").write_text(json.dumps({"precision": "high", "memory": "high"}))
    folds = facts_of(onnx_folder)[1]
    scales = random_scales(folds, onnx_folder, bundle, "decoder")
    assert scales.rows[f"{LAYER}.self_attn.v_proj"].shape == (size * kv_heads,)
    assert scales.columns[f"{LAYER}.self_attn.o_proj"].shape == (128,)
    made = folded(onnx_folder, bundle, tmp_path / "folded", "decoder", 32, scales)
    points = ["logits", f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn.context", f"{LAYER}.self_attn.v_proj"]
    unchanged(onnx_folder, bundle, made, "decoder", points, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_what_is_spread_is_gathered_again(groups: int) -> None:
    fold = Fold("producer", ("reader",), (), groups, 4)
    scales = np.arange(1, 13, dtype=np.float32)
    spread = fold.expand(scales)
    heads = [scales[head * 4 : head * 4 + 4] for head in range(3) for _ in range(groups)]
    assert spread.tolist() == np.concatenate(heads).tolist()
    assert fold.reduce(spread).tolist() == scales.tolist()


# The choice


def write_activations(folder: Path, tensors: dict[str, np.ndarray], readers: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    stored = {name: rows.astype(ml_dtypes.bfloat16) for name, rows in tensors.items()}
    save_file(stored, folder / ACTIVATIONS, metadata={"readers": json.dumps(readers)})
    Manifest("activations", {}, {}, {}).save(folder)
    return folder


def rows_with_outliers(inputs: int, rows: int = 600, seed: int = 3) -> np.ndarray:
    """A few channels thirty times as large as the others, as hidden states have them."""
    random = np.random.default_rng([seed, inputs])
    made = random.standard_normal((rows, inputs))
    made[:, random.permutation(inputs)[: inputs // 40 + 1]] *= 30
    return made


def output_error(weight: np.ndarray, made: np.ndarray, rows: np.ndarray) -> float:
    return relative_error(rows @ weight.T.astype(np.float64), rows @ made.T.astype(np.float64))


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 64, False), (3, 32, False), (4, 0, True)])
def test_outputs_are_closer_where_a_few_inputs_are_large(
    tmp_path: Path, bits: int, block: int, symmetric: bool
) -> None:
    """Against the same search without scales, weighed by the same inputs and not."""
    inputs, form = 128, WeightFormat(bits, block, symmetric, method="awq")
    given = rows_with_outliers(inputs)
    folder = write_activations(tmp_path / "activations", {"a": given}, {"a": "a", "b": "a"})
    activations = Activations(folder)
    random = np.random.default_rng(4)
    weights = {name: random.standard_t(5, (96, inputs)).astype(np.float32) for name in "ab"}
    readers = [(Operator(name, 96, inputs, 1, (), None), weight, form) for name, weight in weights.items()]
    scales = fold_scales(Fold("norm", ("a", "b")), readers, activations)
    assert scales.dtype == np.float32 and scales.shape == (inputs,) and (scales > 0).all()
    methods = Methods(folder)
    methods.scales.add(Fold("norm", ("a", "b")), scales)
    for operator, weight, _ in readers:
        made = methods(operator, form)(0, weight * scales).dequantize() / scales
        shape = (bits, block, symmetric, 16)
        squares = np.square(activations.rows("a")).mean(axis=0)
        plain = round_rows(weight, *shape, "mse").dequantize()
        weighed = round_rows(weight, *shape, "mse", squares).dequantize()
        found = output_error(weight, made, given)
        assert found < 0.8 * output_error(weight, plain, given)
        assert found < output_error(weight, weighed, given)


def test_inputs_that_are_never_used_leave_all_as_it_is(tmp_path: Path) -> None:
    folder = write_activations(tmp_path / "activations", {"a": np.zeros((10, 64))}, {"a": "a"})
    weight = np.ones((8, 64), np.float32)
    reader = (Operator("a", 8, 64, 1, (), None), weight, WeightFormat(4, 32, method="awq"))
    assert fold_scales(Fold("norm", ("a",)), [reader], Activations(folder)) is None


# The stage


@pytest.fixture(scope="module")
def activations(onnx_folder: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of both parts, those that read the same with one tensor, as the stage keeps them."""
    tensors, readers, folds = {}, {}, facts_of(onnx_folder)[1]
    shared = {reader: fold.balance_layers[0] for fold in folds for reader in fold.balance_layers}
    for part in PARTS:
        for seed, operator in enumerate(Part(part, onnx_folder, bundle).operators):
            if operator.kernel == 1:
                readers[operator.name] = shared.get(operator.name, operator.name)
                rows = rows_with_outliers(operator.inputs, seed=seed)
                rows[:, 1:] += 0.7 * rows[:, :-1]
                tensors.setdefault(readers[operator.name], rows)
    return write_activations(tmp_path_factory.mktemp("recorded") / "activations", tensors, readers)


@pytest.fixture(scope="module")
def variants(onnx_folder: Path, bundle: Path, activations: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("variants")
    made = {}
    for method in ("mse", "awq", "gptq"):
        form = WeightFormat(3, 32, method=method)
        made[method] = quantize(onnx_folder, bundle, folder / method, Choice(form, form, ENGINE), 2, activations)
    return made


def read(bundle: Path, onnx_folder: Path, part: str) -> tuple[list[Operator], WeightFile]:
    graph = read_graph(bundle / PARTS[part][0])
    file = WeightFile(graph, bundle / f"{PARTS[part][0]}.weight")
    return operators(graph, module_names(onnx_folder / PARTS[part][1])), file


@pytest.mark.parametrize("part", PARTS)
def test_calibrated_methods_bring_outputs_closer(
    variants: dict[str, Path], bundle: Path, onnx_folder: Path, activations: Path, part: str
) -> None:
    """Of all layers together, by the inputs that were recorded; scales folded out again."""
    kept = Activations(activations)
    floats, weights = read(bundle, onnx_folder, part)
    folds = {reader: fold for fold in facts_of(onnx_folder)[1] for reader in fold.balance_layers}
    harm: dict[str, list[float]] = {}
    for method, made in variants.items():
        points, (layers, file) = folded_tap_points(made), read(made, onnx_folder, part)
        for source, operator in zip(floats, layers, strict=True):
            if operator.kernel > 1:
                continue
            rows = file.rows(operator)
            fold = folds.get(operator.name)
            if fold and fold.smooth_layer in points:
                rows = rows / fold.expand(points[fold.smooth_layer])
            if operator.name in points:
                rows = rows * points[operator.name][:, None]
            error = output_error(weights.rows(source), rows, kept.rows(operator.name))
            harm.setdefault(method, []).append(error)
    assert len(harm["mse"]) == (15 if part == "decoder" else 6)
    assert (np.array(harm["gptq"]) < 0.8 * np.array(harm["mse"])).all()
    assert np.mean(harm["awq"]) < 0.8 * np.mean(harm["mse"])


def test_scales_are_in_the_bundle_where_any_are_folded(variants: dict[str, Path], onnx_folder: Path) -> None:
    """And in its manifest; the engine answers from it."""
    assert [method for method, made in variants.items() if (made / FOLDED).exists()] == ["awq"]
    producers = {fold.smooth_layer for fold in facts_of(onnx_folder)[1]}
    assert producers & set(folded_tap_points(variants["awq"])) >= {f"{LAYER}.input_layernorm", f"{LAYER}.mlp.up_proj"}
    for made in variants.values():
        assert Manifest.load(made).verify() == made
        assert set(Manifest.load(made).inputs) == {"onnx", "base", "activations"}
        assert ask_bundle(made, "What?", [], 4)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_threads_change_no_byte(
    variants: dict[str, Path], onnx_folder: Path, bundle: Path, activations: Path, tmp_path: Path, method: str
) -> None:
    form = WeightFormat(3, 32, method=method)
    for threads in (1, 4):
        again = quantize(onnx_folder, bundle, tmp_path / f"{threads}", Choice(form, form, ENGINE), threads, activations)
        for path in variants[method].iterdir():
            if path.name != "manifest.json":
                assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_folds_on_both_parts_are_kept(variants: dict[str, Path]) -> None:
    """One file for the decoder's scales and the vision tower's."""
    points = folded_tap_points(variants["awq"])
    assert any(point.startswith("model.visual.") for point in points)
    assert any(point.startswith("model.language_model.") for point in points)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_layer_of_which_nothing_was_recorded(onnx_folder: Path, bundle: Path, tmp_path: Path, method: str) -> None:
    name = f"{LAYER}.self_attn.q_proj"
    folder = write_activations(tmp_path / "activations", {name: np.ones((4, 128))}, {name: name})
    form = WeightFormat(4, 32, method=method)
    with pytest.raises(QuantizationError, match=r"no activations of model\.language_model\.layers\.0"):
        quantize(onnx_folder, bundle, tmp_path / "variant", Choice(form, WeightFormat(), ENGINE), 1, folder)
    assert not (tmp_path / "variant").exists()


def test_recorded_inputs_that_are_no_numbers(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    name = "lm_head"
    folder = write_activations(tmp_path / "activations", {name: np.full((4, 128), np.nan)}, {name: name})
    for method in ("gptq", "awq"):
        plan = {"decoder": {name: {"bits": 4, "block": 32, "method": method}}}
        choice = Choice(WeightFormat(), WeightFormat(), ENGINE, plan)
        with pytest.raises(QuantizationError, match=rf"^{name}: .*NaN"):
            quantize(onnx_folder, bundle, tmp_path / method, choice, 1, folder)
        assert not (tmp_path / method).exists()
