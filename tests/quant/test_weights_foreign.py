"""Weights in formats that hf2mnn does not write: llmexport's, and sparse ones of the converter.

They are read with the bits that the engine computes with, or refused with the name of the operator.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mnn_quantizer
from hf2mnn.core.errors import BundleFault, QuantizationError
from hf2mnn.metrics import relative_error
from hf2mnn.mnn.convert import run_converter, write_graph
from hf2mnn.mnn.graph import Graph
from hf2mnn.quant.blob import pack, parse_sparse
from hf2mnn.quant.formats import DENSE, INT8, SPARSE, WeightFormat
from hf2mnn.quant.weights import operators
from hostile import cases
from one_layer import Model, convert, engine_outputs, read_model, write_onnx

LLMEXPORT = Path(__file__).parent / "data" / "llmexport" / "operators.mnn"
ERRORS = {"half": 0, "int8": 0.005, "int4": 0.08, "int4-channel": 0.1, "int4-symmetric": 0.14, "int4-hqq": 0.08}
ERRORS |= {"int2": 0.4, "int1": 0.8}
"""Largest errors of llmexport's weights, relative to its float16 ones."""
INT8_ERROR = 3e-5
"""Share of the largest weight, as in test_weights_engine.py."""
ROWS, INPUTS = 40, 128


def sparse_weight(zeros: float, seed: int = 0) -> np.ndarray:
    """Return a weight with a share of zeros; rows have different magnitudes and offsets, one has zeros alone."""
    random = np.random.default_rng([seed, int(100 * zeros)])
    weight = random.standard_t(4, (ROWS, INPUTS)) * random.lognormal(size=(ROWS, 1)) + random.normal(0, 3, (ROWS, 1))
    weight[random.random(weight.shape) < zeros] = 0
    weight[7] = 0
    return weight.astype(np.float32)


def convert_sparse(folder: Path, weight: np.ndarray, form: WeightFormat) -> Model:
    folder.mkdir(parents=True)
    onnx = write_onnx(folder / "model.onnx", {"layer": weight})
    arguments = ["-f", "ONNX", "--modelFile", str(onnx), "--MNNModel", "model.mnn", "--bizCode", "hf2mnn"]
    run_converter([*arguments, "--saveExternalData=1", "--detectSparseSpeedUp", *mnn_quantizer.options(form)], folder)
    return read_model(folder / "model.mnn")


def layer(model: Model) -> np.ndarray:
    return model.rows()["layer"]


def changed(model: Model, folder: Path, weights: bytes, change: Callable[[dict[str, Any]], Any]) -> Model:
    """Return a model of one layer with other bytes and another description in its graph."""
    folder.mkdir(parents=True)
    graph = Graph(copy.deepcopy(model.graph.content))
    change(graph.of_type("Convolution")[0]["main"])
    write_graph(graph, folder / "model.mnn")
    (folder / "model.mnn.weight").write_bytes(weights)
    return read_model(folder / "model.mnn")


# llmexport's


@pytest.fixture(scope="module")
def llmexport() -> Model:
    return read_model(LLMEXPORT)


@pytest.mark.parametrize("memory", ["high", "low"])
def test_llmexports_weights_are_read_as_by_the_engine(llmexport: Model, memory: str, tmp_path: Path) -> None:
    """Bit-identical if the engine dequantizes them at load time."""
    outputs = engine_outputs({"llmexport": llmexport}, tmp_path, memory)["llmexport"]
    assert outputs.keys() == ERRORS.keys()
    for name, rows in llmexport.rows().items():
        tolerance = INT8_ERROR * np.abs(rows).max() if memory == "low" else 0
        np.testing.assert_allclose(outputs[name], rows, rtol=0, atol=tolerance, err_msg=name)


def test_llmexports_weights_are_the_checkpoints(llmexport: Model) -> None:
    rows = llmexport.rows()
    errors = {name: relative_error(weight, rows["half"]) for name, weight in rows.items()}
    assert {name for name, error in errors.items() if error > ERRORS[name]} == set()
    assert errors["half"] < errors["int8"] < errors["int4"] < errors["int2"] < errors["int1"]


# Sparse quantized weights


SPARSE_GRID = [
    (zeros, WeightFormat(bits, block, symmetric, 16 if zeros < 0.7 and (i + symmetric) % 2 else 32))
    for zeros, (i, bits), block in itertools.product((0.5, 0.9), enumerate((2, 3, 4, 8)), (0, 64))
    for symmetric in (False, True)
]
"""With more than 0.6 of zeros, the graph has `sparseParameter` too, and the engine reads the file differently."""


def test_sparse_weights_are_read_as_by_the_engine(tmp_path: Path) -> None:
    models = {}
    for zeros, form in SPARSE_GRID:
        name = "-".join(map(str, (zeros, *vars(form).values())))
        models[name] = convert_sparse(tmp_path / name, sparse_weight(zeros), form)
        (main,) = (op["main"] for op in models[name].graph.of_type("Convolution"))
        assert main["quanParameter"]["type"] == SPARSE
        assert ("sparseParameter" in main) == (zeros > 0.7)
    exact, low = (engine_outputs(models, tmp_path / memory, memory) for memory in ("high", "low"))
    for name, model in models.items():
        rows = layer(model)
        assert np.array_equal(exact[name]["layer"], rows), name
        tolerance = INT8_ERROR * np.abs(rows).max()
        np.testing.assert_allclose(low[name]["layer"], rows, rtol=0, atol=tolerance, err_msg=name)


def test_rounded_scales_may_change_the_q_of_zero(tmp_path: Path) -> None:
    """In a few rows of a hundred: the converter uses the exact scales, the engine the rounded ones."""
    weight = np.random.default_rng(0).uniform(-1, 1, (600, 64)).astype(np.float32) + np.float32(0.3)
    weight[:, ::2] = 0
    form = WeightFormat(8, 0, False, 16)
    sparse, dense = (
        convert_sparse(tmp_path / "sparse", weight, form),
        convert(tmp_path / "dense", {"layer": weight}, form),
    )
    moved = (layer(sparse) != layer(dense)).any(axis=1)
    assert 0 < moved.mean() < 0.1
    assert np.array_equal(engine_outputs({"sparse": sparse}, tmp_path)["sparse"]["layer"], layer(sparse))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [0, 64])
def test_sparse_and_dense_weights_are_the_same(block: int, symmetric: bool, tmp_path: Path) -> None:
    form = WeightFormat(4, block, symmetric, 32)
    dense = convert(tmp_path / "dense", {"layer": sparse_weight(0.8)}, form)
    sparse = convert_sparse(tmp_path / "sparse", sparse_weight(0.8), form)
    assert [model.layers[0].stored["type"] for model in (dense, sparse)] == [DENSE, SPARSE]
    assert np.array_equal(layer(dense), layer(sparse))


def test_the_engine_crashes_on_sparse_weights_with_float16_scales(tmp_path: Path) -> None:
    """If the graph has `sparseParameter`, it reads the scales as float32. hf2mnn reads them correctly."""
    form = WeightFormat(8, 0, True, 16)
    sparse = convert_sparse(tmp_path / "sparse", sparse_weight(0.9), form)
    assert np.array_equal(layer(sparse), layer(convert(tmp_path / "dense", {"layer": sparse_weight(0.9)}, form)))
    with pytest.raises(BundleFault, match="signal 11"):
        engine_outputs({"sparse": sparse}, tmp_path)


def pack_indices(values: list[int], bits: int) -> bytes:
    return pack(np.array(values, np.int64) - (1 << bits - 1), bits)


def sparse_bytes(q: np.ndarray, zeros: np.ndarray, bits: int, step_bits: int) -> bytes:
    """Encode as `WriteSparseQuanBlobs`.

    Args:
        q: int [blocks, inputs].
        zeros: int [blocks], the q that is not stored. A step that is too long has values of it in between.
        bits: Bits of q.
        step_bits: Bits of a step.
    """
    steps, indices, last, lowest = [], [], 0, -(1 << bits - 1)
    for position, (value, zero) in enumerate(zip(q.reshape(-1), zeros.repeat(q.shape[1]), strict=True)):
        if value != zero or position - last >= (1 << step_bits) - 1:
            steps.append(position - last)
            indices.append(int(value) - lowest)
            last = position
    table = np.arange(lowest, -lowest).astype(np.int8).tobytes()
    head = b"\x02" + np.array(q.shape, "<u2").tobytes() + len(steps).to_bytes(4, "little") + bytes([step_bits])
    return head + pack_indices(steps, step_bits) + bytes([len(table) % 256]) + table + pack_indices(indices, bits)


@st.composite
def sparse(draw: st.DrawFn) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Bytes, scales and q of a few sparse blocks."""
    bits, step_bits, blocks, inputs = (draw(st.integers(*ends)) for ends in ((2, 8), (2, 8), (1, 4), (1, 40)))
    half = 1 << bits - 1
    values = st.integers(-half, half - 1)
    zeros = np.array(draw(st.lists(values, min_size=blocks, max_size=blocks))) * draw(st.sampled_from([0, 1]))
    q = np.repeat(zeros[:, None], inputs, axis=1)
    changes = st.tuples(st.integers(0, blocks - 1), st.integers(0, inputs - 1), values)
    for row, column, value in draw(st.lists(changes, max_size=20)):
        q[row, column] = value
    scale = draw(st.sampled_from([1e-3, 1.0, 7.0]))
    pairs = np.stack([(-half - zeros) * scale, np.full(blocks, scale)], axis=1).astype(np.float32)
    alpha = pairs.reshape(-1) if zeros.any() else np.ones(blocks, np.float32)
    return sparse_bytes(q, zeros, bits, step_bits), alpha, q.astype(np.int8)


@given(sparse())
def test_values_that_are_not_stored_are_the_q_of_zero(drawn: tuple[bytes, np.ndarray, np.ndarray]) -> None:
    stored, alpha, q = drawn
    decoded = parse_sparse(stored, alpha, q.size, False, "layer")
    assert decoded.dtype == np.int8
    assert np.array_equal(decoded, q.reshape(-1))


@pytest.mark.parametrize(
    ("lowest", "scale", "zero"),
    [
        (-1.25, 0.5, -5),
        (1.25, 0.5, -11),
        (-1.0, 0.0, -8),
        (-1.0, 1e-6, -8),
        (-1.0, -1.0, -8),
        (-300.0, 1.0, 36),
        (1e30, 1.0, 0),
        (np.nan, 1.0, 0),
        (np.inf, 1.0, 0),
        (0.0, np.nan, -8),
    ],
)
def test_the_q_of_zero_is_rounded_as_in_c(lowest: float, scale: float, zero: int) -> None:
    """Halves away from 0; of a number that is no int8 the lower bits remain."""
    stored = sparse_bytes(np.zeros((1, 3), np.int8), np.zeros(1, np.int8), 4, 2)
    alpha = np.array([lowest, scale], np.float32)
    assert parse_sparse(stored, alpha, 3, False, "layer").tolist() == [zero] * 3


def refused(stored: bytes, count: int, wide: bool = False) -> None:
    with pytest.raises(QuantizationError, match=rf"^some.layer: its {len(stored)} bytes .* {count} quantized weights"):
        parse_sparse(stored, np.ones(2, np.float32), count, wide, "some.layer")


@pytest.mark.parametrize("bits", range(2, 9))
def test_truncated_sparse_bytes_and_those_of_another_weight_are_refused(bits: int) -> None:
    q = np.array([[1, 0, 0, 0], [0, 0, 0, -1]], np.int8)
    whole = sparse_bytes(q, np.zeros(2, np.int8), bits, 3)
    assert np.array_equal(parse_sparse(whole, np.ones(2), 8, False, "layer"), q.reshape(-1))
    for end in range(len(whole)):
        refused(whole[:end], 8)
    refused(whole + b"\0", 8)
    refused(whole, 9)
    refused(whole, 8, wide=True)
    refused(b"\x01" + whole[1:], 8)
    refused(whole[:5] + b"\xff\xff\xff\xff" + whole[9:], 8)
    for step_bits in (0, 9, 255):
        refused(whole[:9] + bytes([step_bits]) + whole[10:], 8)
    refused(sparse_bytes(q.reshape(1, 8), np.zeros(1, np.int8), bits, 3)[:-1] + b"\0", 7)


def test_sparse_steps_beyond_the_weight_and_indices_beyond_the_table_are_refused() -> None:
    head = b"\x02" + np.array([2, 4], "<u2").tobytes() + (2).to_bytes(4, "little") + b"\x03"
    table = bytes([3, 0, 1, 2])
    for steps, indices, valid in (([0, 7], [1, 2], True), ([1, 7], [1, 2], False), ([0, 7], [1, 3], False)):
        stored = head + pack_indices(steps, 3) + table + pack_indices(indices, 2)
        if valid:
            assert parse_sparse(stored, np.ones(2), 8, False, "layer").tolist() == [1, 0, 0, 0, 0, 0, 0, 2]
        else:
            refused(stored, 8)


@cases(short=60)
@given(sparse(), st.data(), st.booleans())
def test_any_sparse_bytes_are_weights_or_refused(
    drawn: tuple[bytes, np.ndarray, np.ndarray], data: st.DataObject, wide: bool
) -> None:
    """Without another exception or another number of weights, for any scales."""
    stored, alpha, q = bytearray(drawn[0]), drawn[1].copy(), drawn[2]
    changes = st.tuples(st.integers(0, len(stored) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, max_size=3)):
        stored[position] = value
    cut = bytes(stored[: data.draw(st.integers(0, len(stored)))]) if data.draw(st.booleans()) else bytes(stored)
    alpha[data.draw(st.integers(0, alpha.size - 1))] = data.draw(st.floats(width=32))
    try:
        decoded = parse_sparse(cut, alpha, q.size, wide, "some.layer")
    except QuantizationError as error:
        assert str(error).startswith("some.layer: ")
    else:
        assert decoded.dtype == np.int8 and decoded.shape == (q.size,)


@given(st.binary(max_size=40), st.integers(0, 40), st.booleans())
def test_sparse_noise_is_weights_or_refused(stored: bytes, count: int, wide: bool) -> None:
    with contextlib.suppress(QuantizationError):
        assert len(parse_sparse(stored, np.ones(2, np.float32), count, wide, "some.layer")) == count


# Sparse float weights


def test_sparse_floats_are_read_as_by_the_engine(tmp_path: Path) -> None:
    models = {
        f"{zeros}": convert_sparse(tmp_path / f"{zeros}", sparse_weight(zeros), WeightFormat()) for zeros in (0.7, 1)
    }
    outputs = engine_outputs(models, tmp_path / "engine")
    for name, model in models.items():
        assert len(model.layers[0].parts) == 4, "it is not stored as sparse"
        assert np.array_equal(layer(model), sparse_weight(float(name)))
        assert np.array_equal(layer(model), outputs[name]["layer"])


@pytest.mark.parametrize(
    "change",
    [
        lambda main: main["external"].__setitem__(2, main["external"][2] - 4),
        lambda main: main["external"].__setitem__(4, main["external"][4] - 4),
        lambda main: main["common"].update(outputCount=1),
        lambda main: main["external"].__setitem__(0, 2),
    ],
)
def test_sparse_floats_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    """With the name of the operator."""
    model = convert_sparse(tmp_path / "sparse", sparse_weight(0.9), WeightFormat())
    graph = Graph(copy.deepcopy(model.graph.content))
    change(graph.of_type("Convolution")[0]["main"])
    with pytest.raises(QuantizationError, match=r"^layer: \d+ numbers do not fit into \d+ weights"):
        model.weights.rows(operators(graph)[0])


# One int8 a weight, and a factor of the whole weight


INT8_FORMS = {
    "pairs": {"aMin": -128, "readType": ROWS, "quantScale": 1.0},
    "pairs at q = 0": {"aMin": 1, "readType": ROWS, "quantScale": 1.0},
    "old": {"aMin": 0, "readType": 0, "quantScale": 0.0},
    "factor": {"aMin": -128, "readType": ROWS, "quantScale": 0.7},
}


def test_int8_weights_are_read_as_by_the_engine(tmp_path: Path) -> None:
    """Converters store the weights of prequantized models in this form."""
    weight = np.random.default_rng(0).standard_normal((ROWS, INPUTS)).astype(np.float32)
    dense = convert(tmp_path / "dense", {"layer": weight}, WeightFormat(8, 64, False, 32))
    (operator,) = dense.layers
    q = dense.weights.quantized(operator).q.tobytes()
    rest = b"".join(dense.weights.raw(*part) for part in operator.parts[1:])
    models = {
        "dense factor": changed(
            dense, tmp_path / "dense-factor", dense.weights.path.read_bytes(), stored(quantScale=0.3)
        )
    }
    for name, parameters in INT8_FORMS.items():
        models[name] = changed(dense, tmp_path / name, q + rest, stored(len(q), type=INT8, **parameters))
    outputs = engine_outputs(models, tmp_path / "engine")
    for name, model in models.items():
        assert np.array_equal(layer(model), outputs[name]["layer"]), name
    assert np.array_equal(layer(models["pairs"]), layer(dense))
    short = changed(dense, tmp_path / "short", q + rest, stored(len(q) - 1, type=INT8))
    with pytest.raises(QuantizationError, match=r"^layer: its 5119 bytes .* not 5120 quantized weights"):
        layer(short)


def stored(size: int | None = None, **parameters: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of a weight's `quanParameter` and of its size in bytes."""

    def change(main: dict[str, Any]) -> None:
        main["quanParameter"].update(parameters)
        main["external"][1] = main["external"][1] if size is None else size

    return change
