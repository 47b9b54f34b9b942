"""Bundles: the same bytes with any number of threads, a correct table, and errors that name the operator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import pytest

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import ConversionError, Hf2mnnError, ManifestError, QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.ask import ask_bundle
from hf2mnn.mnn.bundle import PARTS, EngineSettings
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.engine import check_bundle
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.onnx.initializers import stored_initializers
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.methods import Methods
from hf2mnn.quant.variant import TABLE, Choice
from hf2mnn.quant.weights import Operator, WeightFile, module_names, operators
from hf2mnn.quant.write import write_weights
from hf2mnn.stages.quantize import quantize

LAYER = "model.language_model.layers.1"
INT4, INT8 = WeightFormat(4, 32, method="mse"), WeightFormat(8, method="mse")
ENGINE = EngineSettings(threads=1)


def choice(**changes: Any) -> Choice:
    return Choice(**{"decoder": INT4, "vision": INT8, "engine": ENGINE, **changes})


PLAN = {
    "decoder": {
        "lm_head": {"bits": 8, "block": 64},
        f"{LAYER}.mlp.down_proj": {"bits": 16},
        f"{LAYER}.mlp.up_proj": {"bits": 32},
        f"{LAYER}.self_attn.q_proj": {"bits": 3, "symmetric": True, "scale_bits": 32},
    }
}


@pytest.fixture(scope="module")
def variant(onnx_folder: Path, graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 4 bits in blocks with a plan, which tests only read."""
    return quantize(onnx_folder, graphs, tmp_path_factory.mktemp("variant") / "mixed", choice(plan=PLAN), threads=2)


def read(bundle: Path, onnx_folder: Path, part: str) -> tuple[list[Operator], WeightFile]:
    """Return operators and weight file. The patch embedding is two operators of one name, one for each frame."""
    file, source = PARTS[part]
    graph = read_graph(bundle / file)
    layers = operators(graph, module_names(onnx_folder / source))
    return layers, WeightFile(graph, bundle / f"{file}.weight")


def named(layers: list[Operator], name: str) -> Operator:
    (operator,) = (operator for operator in layers if operator.name == name)
    return operator


# Contents


def test_the_number_of_threads_changes_no_byte(onnx_folder: Path, graphs: Path, variant: Path, tmp_path: Path) -> None:
    for threads in (1, 4):
        bundle = quantize(onnx_folder, graphs, tmp_path / f"{threads}", choice(plan=PLAN), threads)
        for path in sorted(variant.iterdir()):
            if path.name != "manifest.json":
                assert (bundle / path.name).read_bytes() == path.read_bytes(), path.name
        assert sorted(path.name for path in bundle.iterdir()) == sorted(path.name for path in variant.iterdir())


def test_the_engine_answers(variant: Path, bundle: Path) -> None:
    check_bundle(variant)
    assert ask_bundle(variant, "What?", [], 6)
    assert ask_bundle(bundle, "What?", [], 6)


def test_every_operator_has_its_format(variant: Path, onnx_folder: Path) -> None:
    layers, _ = read(variant, onnx_folder, "decoder")
    graph = read_graph(variant / "llm.mnn")
    assert len(layers) == 15
    plan = {"lm_head": (8, 64), f"{LAYER}.mlp.down_proj": (16, 0), f"{LAYER}.mlp.up_proj": (32, 0)}
    for operator, info in zip(layers, graph.weights(), strict=True):
        if operator.name == f"{LAYER}.self_attn.q_proj":
            assert (info.bits, info.symmetric, info.scale_bits, info.block) == (3, True, 32, 32)
        else:
            assert (info.bits, info.block) == plan.get(operator.name, (4, 32)), operator.name


def test_the_table_is_correct(variant: Path, bundle: Path, onnx_folder: Path) -> None:
    """Bytes as in the written graph, errors from reading both files again."""
    table = pd.read_csv(variant / TABLE)
    rows = {(row.part, row.operator, row.bytes): row for row in table.itertuples()}
    total = 0
    for part in PARTS:
        layers, file = read(variant, onnx_folder, part)
        floats, weights = read(bundle, onnx_folder, part)
        of_part = table[table["part"] == part]
        assert sorted(of_part["operator"]) == sorted(operator.name for operator in layers)
        errors: dict[str, list[float]] = {}
        for operator, source in zip(layers, floats, strict=True):
            exact = weights.rows(source).astype(np.float64)
            error = np.linalg.norm(exact - file.rows(operator)) / np.linalg.norm(exact)
            errors.setdefault(operator.name, []).append(error)
            size = operator.parts[0][1] + operator.parts[1][1]
            row = rows[part, operator.name, size]
            assert (row.outputs, row.inputs) == exact.shape
            total += size
        for name, expected in errors.items():
            listed = of_part.loc[of_part["operator"] == name, "weight_error"]
            np.testing.assert_allclose(sorted(listed), sorted(expected), rtol=1e-4, atol=1e-9, err_msg=name)
    results = Manifest.load(variant).results
    assert results["weight_bytes"] == total == table["bytes"].sum()
    assert results["weights"] == (table["outputs"] * table["inputs"]).sum()
    assert results["bits_per_weight"] == pytest.approx(8 * total / results["weights"], abs=1e-4)


def test_biases_and_gammas_are_those_of_the_float_model(variant: Path, bundle: Path, onnx_folder: Path) -> None:
    for part in PARTS:
        layers, file = read(variant, onnx_folder, part)
        floats, weights = read(bundle, onnx_folder, part)
        biases = [(file.bias(layer), weights.bias(source)) for layer, source in zip(layers, floats, strict=True)]
        assert all(stored == exact for stored, exact in biases)
        assert any(np.frombuffer(stored, np.float32).any() for stored, _ in biases)
        constants = [
            [source.constants(op) for op in read_graph(folder / PARTS[part][0]).of_type("LayerNorm")]
            for folder, source in ((variant, file), (bundle, weights))
        ]
        assert constants[0] == constants[1]
        assert len(constants[0]) >= 3


def test_operators_have_the_names_of_their_modules(bundle: Path, checkpoint_folder: Path, onnx_folder: Path) -> None:
    """By the checkpoint's values of that name, because layers of one shape are easily exchanged."""
    checkpoint = Checkpoint(checkpoint_folder)
    for part, count in (("decoder", 15), ("vision", 8)):
        layers, weights = read(bundle, onnx_folder, part)
        assert len(layers) == count
        frames = iter(range(2))
        for operator in layers:
            exact = checkpoint.tensor(f"{operator.name}.weight").float().numpy()
            if operator.kernel > 1:
                exact = exact[:, :, next(frames)].reshape(operator.outputs, operator.inputs)
            assert np.array_equal(weights.rows(operator), exact), operator.name


# Errors


def changed_onnx(onnx_folder: Path, destination: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """Copy a folder of the export stage with a change of the bfloat16 weight of an operator of the decoder."""
    shutil.copytree(onnx_folder, destination)
    stored = stored_initializers(destination / "decoder.onnx")[f"{name}.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    content = bytearray(stored.path.read_bytes())
    span = slice(stored.offset, stored.offset + stored.size)
    values = np.frombuffer(content[span], ml_dtypes.bfloat16).copy()
    change(values)
    content[span] = values.tobytes()
    stored.path.unlink()
    stored.path.write_bytes(content)
    return with_manifest(destination)


def with_manifest(folder: Path) -> Path:
    """Write a manifest of the folder's present files."""
    Manifest.load(folder).save(folder)
    return folder


def refused(
    onnx_folder: Path, graphs: Path, destination: Path, settings: Choice, kind: type[Hf2mnnError] = QuantizationError
) -> str:
    """Return the message, and check that no folder remains."""
    before = set(destination.parent.iterdir())
    with pytest.raises(kind) as error:
        quantize(onnx_folder, graphs, destination, settings, threads=2)
    assert type(error.value) is kind
    assert not destination.exists()
    remaining = [path for path in set(destination.parent.iterdir()) - before if (path / "manifest.json").exists()]
    assert not remaining
    return str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(onnx_folder: Path, graphs: Path, tmp_path: Path, value: float) -> None:
    name = f"{LAYER}.mlp.gate_proj"
    onnx = changed_onnx(onnx_folder, tmp_path / "onnx", name, lambda values: values.__setitem__(1234, value))
    for form in (INT4, WeightFormat(4, 32), WeightFormat(16)):
        message = refused(onnx, graphs, tmp_path / "variant", choice(decoder=form))
        assert message.startswith(f"{name}: ") and "NaN or infinite" in message


@pytest.mark.parametrize("block", [48, 256])
def test_a_block_that_does_not_divide_the_inputs(onnx_folder: Path, graphs: Path, tmp_path: Path, block: int) -> None:
    """The converter would store one scale per channel, without a message."""
    message = refused(onnx_folder, graphs, tmp_path / "variant", choice(decoder=WeightFormat(4, block, method="mse")))
    assert message.startswith("model.language_model.layers.0.self_attn.q_proj: ")
    assert f"block {block} does not divide its 128 inputs" in message
    assert "64, 32, 16 or 0" in message


def test_a_block_of_the_vision_tower_is_checked_too(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    message = refused(onnx_folder, graphs, tmp_path / "variant", choice(vision=WeightFormat(8, 128, method="mse")))
    assert message.startswith("model.visual.blocks.0.attn.qkv: ") and "its 96 inputs; use 32, 16 or 0" in message


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_for_an_unknown_operator(onnx_folder: Path, graphs: Path, tmp_path: Path, part: str) -> None:
    plan = {part: {"model.layers.7.mlp.up_proj": {"bits": 8}}}
    message = refused(onnx_folder, graphs, tmp_path / "variant", choice(plan=plan))
    assert message.startswith("model.layers.7.mlp.up_proj: the plan names this operator")
    assert f"but the {part} does not have it; it has model." in message


def test_a_plan_with_a_block_that_does_not_divide_the_inputs(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    message = refused(onnx_folder, graphs, tmp_path / "variant", choice(plan={"decoder": {"lm_head": {"block": 96}}}))
    assert message.startswith("lm_head: block 96 ")


def test_weights_beyond_the_range_of_float16(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    """Refused by formats with float16, and stored with float32 scales."""
    name = f"{LAYER}.mlp.gate_proj"
    onnx = changed_onnx(
        onnx_folder, tmp_path / "onnx", name, lambda values: values.__setitem__(slice(100, 102), [-3e7, 3e7])
    )
    for form in (INT4, WeightFormat(8, 32), WeightFormat(16)):
        message = refused(onnx, graphs, tmp_path / "variant", choice(decoder=form))
        assert message.startswith(f"{name}: ") and "exceed the range of float16" in message
    form = WeightFormat(4, 32, scale_bits=32, method="mse")
    bundle = quantize(onnx, graphs, tmp_path / "variant", choice(decoder=form), threads=1)
    layers, file = read(bundle, onnx_folder, "decoder")
    # Thirty small weights share the block, so that the large ones are not exact.
    np.testing.assert_allclose(file.rows(named(layers, name)).reshape(-1)[100:102], [-3e7, 3e7], rtol=0.1)


def test_a_truncated_weight_file(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    """With a matching manifest, which only a defect of hf2mnn could write."""
    copy = Path(shutil.copytree(graphs, tmp_path / "graphs"))
    path = copy / "llm.weight"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1000])
    message = refused(onnx_folder, with_manifest(copy), tmp_path / "variant", choice(), ConversionError)
    assert "llm.weight has" in message and "truncated, and logits has no weight" in message


def test_a_quantized_model(onnx_folder: Path, variant: Path, tmp_path: Path) -> None:
    """The converter reports success and does not change it."""
    message = refused(onnx_folder, variant, tmp_path / "again", choice(), ManifestError)
    assert "is a folder of the stage 'quantize'" in message
    layers, file = read(variant, onnx_folder, "decoder")
    graph, formats = read_graph(variant / "llm.mnn"), {layer.name: INT4 for layer in layers}
    name = "model.language_model.layers.0.self_attn.q_proj"
    with pytest.raises(QuantizationError, match=rf"^{name}: its weight is quantized already"):
        write_weights(graph, layers, file, tmp_path / "again", formats, Methods(), 1, "decoder")


def test_a_calibrated_method_without_calibration(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    for method in ("gptq", "awq"):
        message = refused(onnx_folder, graphs, tmp_path / method, choice(decoder=WeightFormat(4, 32, method=method)))
        assert message.startswith("model.language_model.layers.0.") and "--calibration" in message


def test_a_plan_with_symmetric_hqq(onnx_folder: Path, graphs: Path, tmp_path: Path) -> None:
    """The method hqq searches a zero point, which a symmetric format does not store."""
    plan = {"decoder": {"lm_head": {"symmetric": True}}}
    settings = choice(decoder=WeightFormat(4, 32, method="hqq"), plan=plan)
    message = refused(onnx_folder, graphs, tmp_path / "variant", settings)
    assert message.startswith("lm_head: ") and "hqq" in message


# Float formats


def test_float16_computes_as_the_checkpoint(onnx_folder: Path, graphs: Path, bundle: Path, tmp_path: Path) -> None:
    """float16 holds all but the smallest of these bfloat16 weights."""
    form = WeightFormat(16)
    half = quantize(onnx_folder, graphs, tmp_path / "half", choice(decoder=form, vision=form), threads=2)
    for part in PARTS:
        halves, file = read(half, onnx_folder, part)
        floats, weights = read(bundle, onnx_folder, part)
        for operator, source in zip(halves, floats, strict=True):
            assert operator.stored["type"] == FLOAT16
            # Small float16 are multiples of 2^-24.
            assert np.abs(file.rows(operator) - weights.rows(source)).max() <= 2**-25
    assert ask_bundle(half, "What?", [], 6) == ask_bundle(bundle, "What?", [], 6)
    assert json.loads((half / "llm_config.json").read_text()) == json.loads((bundle / "llm_config.json").read_text())
