"""A variant's weight file: the same bytes with any threads, its table true, and what cannot be is an error with the
operator's name and no folder behind it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import ConversionError, Hf2mnnError, QuantizationError
from hf2mnn.core.manifest import Manifest
from hf2mnn.mnn.ask import ask_bundle
from hf2mnn.mnn.bundle import PARTS, EngineSettings
from hf2mnn.mnn.convert import WeightFormat, read_graph
from hf2mnn.mnn.engine import check_bundle
from hf2mnn.mnn.graph import FLOAT16
from hf2mnn.quant.names import module_names
from hf2mnn.quant.variant import TABLE, Choice
from hf2mnn.quant.weights import Operator, WeightFile, operators
from hf2mnn.stages.quantize import run as quantize

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
def variant(onnx_folder: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits in blocks, but for what a plan says. Tests only read it."""
    return quantize(onnx_folder, bundle, tmp_path_factory.mktemp("variant") / "mixed", choice(plan=PLAN), threads=2)


def read(bundle: Path, onnx_folder: Path, part: str) -> tuple[list[Operator], WeightFile]:
    """Operators, and the file under them. The patch embedding is two, one for each frame, by one name."""
    file, source = PARTS[part]
    graph = read_graph(bundle / file)
    layers = operators(graph, module_names(onnx_folder / source))
    return layers, WeightFile(graph, bundle / f"{file}.weight")


def named(layers: list[Operator], name: str) -> Operator:
    (found,) = (operator for operator in layers if operator.name == name)
    return found


# What is written


def test_threads_change_no_byte(onnx_folder: Path, bundle: Path, variant: Path, tmp_path: Path) -> None:
    for threads in (1, 4):
        made = quantize(onnx_folder, bundle, tmp_path / f"{threads}", choice(plan=PLAN), threads)
        for path in sorted(variant.iterdir()):
            if path.name != "manifest.json":
                assert (made / path.name).read_bytes() == path.read_bytes(), path.name
        assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in variant.iterdir())


def test_the_real_engine_answers_from_it(variant: Path, bundle: Path) -> None:
    check_bundle(variant)
    assert ask_bundle(variant, "What?", [], 6)
    assert ask_bundle(bundle, "What?", [], 6)


def test_every_operator_has_the_format_that_it_was_given(variant: Path, onnx_folder: Path) -> None:
    layers, _ = read(variant, onnx_folder, "decoder")
    graph = read_graph(variant / "llm.mnn")
    assert len(layers) == 15
    plan = {"lm_head": (8, 64), f"{LAYER}.mlp.down_proj": (16, 0), f"{LAYER}.mlp.up_proj": (32, 0)}
    for operator, info in zip(layers, graph.weights(), strict=True):
        if operator.name == f"{LAYER}.self_attn.q_proj":
            assert (info.bits, info.symmetric, info.scale_bits, info.block) == (3, True, 32, 32)
        else:
            assert (info.bits, info.block) == plan.get(operator.name, (4, 32)), operator.name


def test_the_table_is_true(variant: Path, bundle: Path, onnx_folder: Path) -> None:
    """Bytes by the graph that was written, errors by reading both files again."""
    table = pd.read_csv(variant / TABLE)
    rows = {(row.part, row.operator, row.bytes): row for row in table.itertuples()}
    total = 0
    for part in PARTS:
        made, file = read(variant, onnx_folder, part)
        floats, weights = read(bundle, onnx_folder, part)
        found = table[table["part"] == part]
        assert sorted(found["operator"]) == sorted(operator.name for operator in made)
        errors: dict[str, list[float]] = {}
        for operator, source in zip(made, floats, strict=True):
            wanted = weights.rows(source).astype(np.float64)
            error = np.linalg.norm(wanted - file.rows(operator)) / np.linalg.norm(wanted)
            errors.setdefault(operator.name, []).append(error)
            size = operator.parts[0][1] + operator.parts[1][1]
            row = rows[part, operator.name, size]
            assert (row.outputs, row.inputs) == wanted.shape
            total += size
        for name, wanted in errors.items():
            given = found.loc[found["operator"] == name, "weight_error"]
            np.testing.assert_allclose(sorted(given), sorted(wanted), rtol=1e-4, atol=1e-9, err_msg=name)
    results = Manifest.load(variant).results
    assert results["weight_bytes"] == total == table["bytes"].sum()
    assert results["weights"] == (table["outputs"] * table["inputs"]).sum()
    assert results["bits_per_weight"] == pytest.approx(8 * total / results["weights"], abs=1e-4)


def test_biases_and_gammas_are_the_float_models(variant: Path, bundle: Path, onnx_folder: Path) -> None:
    for part in PARTS:
        made, file = read(variant, onnx_folder, part)
        floats, weights = read(bundle, onnx_folder, part)
        biases = [(file.bias(made), weights.bias(source)) for made, source in zip(made, floats, strict=True)]
        assert all(found == wanted for found, wanted in biases)
        assert any(np.frombuffer(found, np.float32).any() for found, _ in biases)
        kept = [
            [source.constants(op) for op in read_graph(folder / PARTS[part][0]).of_type("LayerNorm")]
            for folder, source in ((variant, file), (bundle, weights))
        ]
        assert kept[0] == kept[1]
        assert len(kept[0]) >= 3


def test_operators_have_their_modules_names(bundle: Path, checkpoint_folder: Path, onnx_folder: Path) -> None:
    """By the values that the checkpoint has under that name: layers of one shape are easily mistaken for each other."""
    checkpoint = Checkpoint(checkpoint_folder)
    for part, count in (("decoder", 15), ("vision", 8)):
        layers, weights = read(bundle, onnx_folder, part)
        assert len(layers) == count
        frames = iter(range(2))
        for operator in layers:
            wanted = checkpoint.tensor(f"{operator.name}.weight").float().numpy()
            if operator.kernel > 1:
                wanted = wanted[:, :, next(frames)].reshape(operator.outputs, operator.inputs)
            assert np.array_equal(weights.rows(operator), wanted), operator.name


# What is refused


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "float"))


def vouched(folder: Path) -> Path:
    """A manifest that vouches for the folder as it now is."""
    manifest = Manifest.load(folder)
    manifest.folder = None
    manifest.save(folder)
    return folder


def spoil(bundle: Path, onnx_folder: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
    """Change the float weight of an operator of the decoder."""
    operator = named(read(bundle, onnx_folder, "decoder")[0], name)
    path = bundle / "llm.mnn.weight"
    content = bytearray(path.read_bytes())
    (offset, size), *_ = operator.parts
    values = np.frombuffer(content[offset : offset + size], np.float32).copy()
    change(values)
    content[offset : offset + size] = values.tobytes()
    path.unlink()
    path.write_bytes(content)
    return vouched(bundle)


def refused(
    onnx_folder: Path, bundle: Path, destination: Path, asked: Choice, kind: type[Hf2mnnError] = QuantizationError
) -> str:
    """The sentence, once nothing is left of the folder, nor beside it."""
    beside = set(destination.parent.iterdir())
    with pytest.raises(kind) as error:
        quantize(onnx_folder, bundle, destination, asked, threads=2)
    assert type(error.value) is kind
    assert not destination.exists()
    left = [path for path in set(destination.parent.iterdir()) - beside if (path / "manifest.json").exists()]
    assert not left
    return str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [INT4, WeightFormat(4, 32), WeightFormat(16)], ids=["mse", "rtn", "half"])
def test_a_weight_that_is_no_number(
    onnx_folder: Path, copy: Path, tmp_path: Path, value: float, form: WeightFormat
) -> None:
    name = f"{LAYER}.mlp.gate_proj"
    spoil(copy, onnx_folder, name, lambda values: values.__setitem__(1234, value))
    said = refused(onnx_folder, copy, tmp_path / "variant", choice(decoder=form))
    assert said.startswith(f"{name}: ") and "NaN or infinite" in said


@pytest.mark.parametrize("block", [48, 256])
def test_a_block_that_does_not_divide(onnx_folder: Path, bundle: Path, tmp_path: Path, block: int) -> None:
    """The converter would give one scale a channel, and say nothing."""
    said = refused(onnx_folder, bundle, tmp_path / "variant", choice(decoder=WeightFormat(4, block, method="mse")))
    assert said.startswith("model.language_model.layers.0.self_attn.q_proj: ")
    assert f"block {block} does not divide its 128 inputs" in said
    assert "64, 32, 16 or 0" in said


def test_a_block_of_the_vision_tower_is_named_too(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    said = refused(onnx_folder, bundle, tmp_path / "variant", choice(vision=WeightFormat(8, 128, method="mse")))
    assert said.startswith("model.visual.blocks.0.attn.qkv: ") and "its 96 inputs; use 32, 16 or 0" in said


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_for_an_operator_that_is_not_there(onnx_folder: Path, bundle: Path, tmp_path: Path, part: str) -> None:
    plan = {part: {"model.layers.7.mlp.up_proj": {"bits": 8}}}
    said = refused(onnx_folder, bundle, tmp_path / "variant", choice(plan=plan))
    assert f"the plan names model.layers.7.mlp.up_proj, which the {part} does not have" in said


def test_a_plan_may_choose_a_block_that_does_not_divide(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    said = refused(onnx_folder, bundle, tmp_path / "variant", choice(plan={"decoder": {"lm_head": {"block": 96}}}))
    assert said.startswith("lm_head: block 96 ")


@pytest.mark.parametrize("form", [INT4, WeightFormat(8, 32), WeightFormat(16)], ids=["mse", "rtn", "half"])
def test_weights_that_half_floats_cannot_hold(
    onnx_folder: Path, copy: Path, tmp_path: Path, form: WeightFormat
) -> None:
    name = f"{LAYER}.mlp.gate_proj"
    spoil(copy, onnx_folder, name, lambda values: values.__setitem__(slice(100, 102), [-3e7, 3e7]))
    said = refused(onnx_folder, copy, tmp_path / "variant", choice(decoder=form))
    assert said.startswith(f"{name}: ") and "too large for half floats" in said


def test_with_float32_scales_they_are_stored(onnx_folder: Path, copy: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.gate_proj"
    spoil(copy, onnx_folder, name, lambda values: values.__setitem__(slice(100, 102), [-3e7, 3e7]))
    form = WeightFormat(4, 32, scale_bits=32, method="mse")
    made = quantize(onnx_folder, copy, tmp_path / "variant", choice(decoder=form), threads=1)
    layers, file = read(made, onnx_folder, "decoder")
    # Far beyond half floats. Thirty small weights share the block, so that the large ones are not met exactly.
    np.testing.assert_allclose(file.rows(named(layers, name)).reshape(-1)[100:102], [-3e7, 3e7], rtol=0.1)


def test_a_weight_file_that_was_cut_short(onnx_folder: Path, copy: Path, tmp_path: Path) -> None:
    """With a manifest that vouches for it, as only a fault of ours could write."""
    path = copy / "llm.mnn.weight"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1000])
    said = refused(onnx_folder, vouched(copy), tmp_path / "variant", choice(), ConversionError)
    assert "llm.mnn.weight has" in said and "cut short, and logits has no weight" in said


def test_a_model_that_is_quantized_already(onnx_folder: Path, variant: Path, tmp_path: Path) -> None:
    """The converter answers "success", and leaves it as it was."""
    said = refused(onnx_folder, variant, tmp_path / "again", choice())
    assert "its weight is quantized already" in said
    assert said.startswith("model.language_model.layers.0.self_attn.q_proj: ")


def test_a_calibrated_method_without_activations(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    for method in ("gptq", "awq"):
        said = refused(onnx_folder, bundle, tmp_path / method, choice(decoder=WeightFormat(4, 32, method=method)))
        assert said.startswith("model.language_model.layers.0.") and "--activations" in said


def test_a_plan_that_makes_hqq_symmetric(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    """It searches a zero point, and symmetric has none: without one the levels mean other weights."""
    plan = {"decoder": {"lm_head": {"symmetric": True}}}
    asked = choice(decoder=WeightFormat(4, 32, method="hqq"), plan=plan)
    said = refused(onnx_folder, bundle, tmp_path / "variant", asked)
    assert said.startswith("lm_head: ") and "hqq" in said


# The same model


def test_half_floats_compute_what_the_checkpoint_does(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    """bfloat16 weights of this size are half floats but for the smallest."""
    half = WeightFormat(16)
    made = quantize(onnx_folder, bundle, tmp_path / "half", choice(decoder=half, vision=half), threads=2)
    for part in PARTS:
        halves, file = read(made, onnx_folder, part)
        floats, weights = read(bundle, onnx_folder, part)
        for operator, source in zip(halves, floats, strict=True):
            assert operator.stored["type"] == FLOAT16
            # Small ones are multiples of 2^-24.
            assert np.abs(file.rows(operator) - weights.rows(source)).max() <= 2**-25
    assert ask_bundle(made, "What?", [], 6) == ask_bundle(bundle, "What?", [], 6)
    assert json.loads((made / "llm_config.json").read_text()) == json.loads((bundle / "llm_config.json").read_text())
