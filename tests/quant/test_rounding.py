"""rtn and hqq give the results of MNN's converter, and mse has smaller errors, for any weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba import njit

from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.bundle import DECODER
from hf2mnn.mnn.convert import read_graph
from hf2mnn.quant import rounding, write
from hf2mnn.quant.blob import Quantized
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.rounding import LANES, round_rows
from hf2mnn.quant.weights import Operator, WeightFile, module_names, operators
from hostile import cases
from mnn_quantizer import convert_decoder
from one_layer import convert

METHODS = ("rtn", "hqq", "mse")


def error(weight: np.ndarray, quantized: Quantized) -> float:
    """Return the error relative to the weight."""
    return float(np.linalg.norm(weight.astype(np.float64) - quantized.dequantize()) / np.linalg.norm(weight))


def block_errors(weight: np.ndarray, quantized: Quantized) -> np.ndarray:
    """Return sums of squared errors, float64 [rows, blocks]."""
    squares = np.square(weight.astype(np.float64) - quantized.dequantize())
    return squares.reshape(*quantized.scales.shape, -1).sum(axis=2)


def from_converter(folder: Path, weight: np.ndarray, form: WeightFormat) -> Quantized:
    model = convert(folder, {"layer": weight}, form)
    return model.weights.quantized(model.by_name["layer"])


def toward_zero(values: np.ndarray) -> np.ndarray:
    """Truncate float32 values to float16, as the converter stores scales; return float32."""
    halves = values.astype(np.float16)
    over = np.abs(halves.astype(np.float32)) > np.abs(values)
    return np.where(over, np.nextafter(halves, np.float16(0)), halves).astype(np.float32)


# Methods of the converter


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return (0.05 * np.random.default_rng(0).standard_t(5, (96, 128))).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_is_that_of_the_converter(weight: np.ndarray, tmp_path: Path, bits: int, symmetric: bool) -> None:
    """float32 scales have the same bits; float16 ones are rounded here and truncated in the converter.

    q is the same but for weights in the middle between two values, where its division and round() differ.
    """
    for block in (32 * (bits % 2),):
        theirs = from_converter(tmp_path / f"{block}", weight, WeightFormat(bits, block, symmetric, 32))
        truncated = from_converter(tmp_path / f"{block}-half", weight, WeightFormat(bits, block, symmetric, 16))
        ours = round_rows(weight, WeightFormat(bits, block, symmetric, 32, "rtn"))
        halves = round_rows(weight, WeightFormat(bits, block, symmetric, 16, "rtn"))
        assert np.array_equal(ours.scales, theirs.scales)
        assert np.array_equal(truncated.scales, toward_zero(theirs.scales))
        assert np.array_equal(halves.scales, ours.scales.astype(np.float16).astype(np.float32))
        assert np.array_equal(truncated.q, theirs.q)
        assert np.array_equal(halves.q, ours.q)

        blocks = (*ours.scales.shape, -1)
        z = 0.0 if ours.zero_points is None else ours.zero_points[:, :, None]
        exact = (weight.reshape(blocks) - z) / ours.scales[:, :, None]
        difference = np.abs(ours.q.reshape(blocks).astype(int) - theirs.q.reshape(blocks))
        halfway = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
        assert difference.max() <= 1
        assert not difference[~halfway].any()
        assert error(weight, ours) == pytest.approx(error(weight, theirs), rel=1e-4)
        # hf2mnn stores the weight at q = 0, which is smaller than that at the lowest q.
        assert error(weight, halves) <= 1.001 * error(weight, truncated)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_hqq_is_that_of_the_converter(weight: np.ndarray, tmp_path: Path, bits: int) -> None:
    for block in (64 * (bits % 4 == 0),):
        for scale_bits, tolerance in ((32, 0.002), (16, 0.02)):
            form = WeightFormat(bits, block, False, scale_bits, "hqq")
            theirs = from_converter(tmp_path / f"{block}-{scale_bits}", weight, form)
            ours = round_rows(weight, form)
            assert error(weight, ours) == pytest.approx(error(weight, theirs), rel=tolerance)
            assert (ours.q == theirs.q).mean() > 0.99
            np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-6 if scale_bits == 32 else 1e-3)


def test_every_layer_of_a_model_has_the_converters_error(onnx_folder: Path, bundle: Path, tmp_path: Path) -> None:
    form = WeightFormat(4, 64)
    theirs = convert_decoder(onnx_folder, tmp_path, 2, form)
    names = module_names(onnx_folder / "decoder.onnx")
    floats = read_graph(bundle / DECODER)
    file, weights = WeightFile(theirs, tmp_path / f"{DECODER}.weight"), WeightFile(floats, bundle / f"{DECODER}.weight")
    layers = operators(floats, names)
    assert len(layers) == 15
    for operator, stored in zip(layers, operators(theirs, names), strict=True):
        assert operator.name == stored.name
        rows = weights.rows(operator)
        ours = round_rows(rows, form)
        assert error(rows, ours) == pytest.approx(error(rows, file.quantized(stored)), rel=1e-3), operator.name


# mse


@pytest.fixture(scope="module")
def heavy() -> np.ndarray:
    """1024 x 1536 values of Student's t with 6 degrees of freedom, for which facts/mnn.md has results."""
    return np.random.default_rng(0).standard_t(6, (1024, 1536)).astype(np.float32)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0975), (3, 0.197), (2, 0.375)])
def test_mse_has_smaller_errors_than_rtn_and_hqq(heavy: np.ndarray, bits: int, bound: float) -> None:
    results = {method: round_rows(heavy, WeightFormat(bits, 64, method=method)) for method in METHODS}
    errors = {method: error(heavy, quantized) for method, quantized in results.items()}
    assert errors["mse"] <= bound
    assert errors["mse"] < errors["hqq"] < errors["rtn"]
    mse, rtn, hqq = (block_errors(heavy, results[method]) for method in ("mse", "rtn", "hqq"))
    assert (mse <= (1 + 1e-5) * rtn).all()
    # Both search: hqq has the better zero point for a few blocks.
    assert (mse <= hqq).mean() > 0.9


@pytest.mark.parametrize(("bits", "block"), [(2, 64), (3, 64), (4, 64), (4, 0)])
def test_the_short_search_is_as_good_for_uniform_importance(heavy: np.ndarray, bits: int, block: int) -> None:
    """It has a third of the steps; a nearly uniform importance uses the full search."""
    rows, nearly = heavy[:256], np.ones(1536, np.float32)
    nearly[0] = np.nextafter(np.float32(1), np.float32(2))
    short, whole = (
        round_rows(rows, WeightFormat(bits, block, method="mse"), importance) for importance in (None, nearly)
    )
    assert error(rows, whole) < error(rows, short) < 1.01 * error(rows, whole)


@st.composite
def blocks(draw: st.DrawFn) -> np.ndarray:
    """Float32 [3, 32], two blocks of 16 a row, of any magnitude: constant, with an outlier, sparse, of one sign, ..."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(6):
        values = random.standard_normal(16)
        kind = draw(st.sampled_from(["normal", "constant", "outlier", "zero", "sparse", "one sign", "two", "offset"]))
        if kind == "constant":
            values[:] = values[0]
        elif kind == "outlier":
            values[3] = 100 * values[3]
        elif kind == "zero":
            values[:] = 0
        elif kind == "sparse":
            values[1:14] = 0
        elif kind == "one sign":
            values = np.abs(values)
        elif kind == "two":
            values = np.where(values > 0, values[0], values[1])
        elif kind == "offset":
            values += 50
        rows.append(values * 10.0 ** draw(st.integers(-12, 3)))
    return np.array(rows, np.float32).reshape(3, 32)


SHAPES = {
    "bits": st.integers(2, 8),
    "symmetric": st.booleans(),
    "scale_bits": st.sampled_from([16, 32]),
}


@cases(short=250)
@given(weight=blocks(), **SHAPES)
def test_no_block_has_a_larger_error_than_with_rtn(
    weight: np.ndarray, bits: int, symmetric: bool, scale_bits: int
) -> None:
    rtn, mse = (
        block_errors(weight, round_rows(weight, WeightFormat(bits, 16, symmetric, scale_bits, method)))
        for method in ("rtn", "mse")
    )
    # Errors are summed in float32, and small float16 scales are multiples of 2^-24.
    slack = 1e-5 * rtn + 1e-12 * np.square(weight.astype(np.float64)).reshape(3, 2, -1).sum(axis=2)
    slack += 16 * (2.0 ** (bits - 26)) ** 2 if scale_bits == 16 else 0
    assert (mse <= rtn + slack).all()


@cases(short=60)
@given(weight=blocks(), method=st.sampled_from(METHODS), **SHAPES)
@example(
    weight=np.linspace(-1e5, 3e5, 96, dtype=np.float32).reshape(3, 32),
    bits=2,
    symmetric=False,
    scale_bits=16,
    method="mse",
)
def test_results_can_be_stored(weight: np.ndarray, bits: int, symmetric: bool, scale_bits: int, method: str) -> None:
    """Scales beyond the range of float16, 65504, are refused."""
    symmetric = symmetric and method != "hqq"
    form = WeightFormat(bits, 16, symmetric, scale_bits, method)
    quantized = round_rows(weight, form)
    assert quantized.q.dtype == np.int8 and quantized.q.shape == weight.shape
    assert quantized.q.min() >= -(1 << bits - 1) and quantized.q.max() < 1 << bits - 1
    assert (quantized.zero_points is None) == symmetric
    parts = [quantized.scales, *([] if symmetric else [quantized.zero_points])]
    for part in parts:
        assert part.shape == (3, 2) and part.dtype == np.float32
        assert np.isfinite(part).all()
    assert np.isfinite(quantized.dequantize()).all()
    if scale_bits == 16 and max(np.abs(part).max() for part in parts) > 65504:
        with pytest.raises(QuantizationError, match="layer: its scales exceed the range of float16"):
            write._encode_quantized(weight, quantized, Operator("layer", 3, 32, 1, (), None), form)
    elif scale_bits == 16:
        assert all(np.array_equal(part, part.astype(np.float16).astype(np.float32)) for part in parts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 2.0**-20])
def test_a_constant_block_keeps_its_value(method: str, value: float) -> None:
    """Pruned or untrained channels: exact for a value that float16 holds.

    The smallest scale of hqq is 1e-7, and its error a quarter of a step.
    """
    weight = np.full((5, 32), value, np.float32)
    for bits in (2, 4, 8):
        restored = round_rows(weight, WeightFormat(bits, 16, method=method)).dequantize()
        if method == "hqq":
            np.testing.assert_allclose(restored, weight, rtol=1e-3, atol=2.0**-24)
        else:
            assert np.array_equal(restored, weight)
            # If symmetric, q times a float16 with 11 bits; a scale as small as 2^-27 is 0.
            restored = round_rows(weight, WeightFormat(bits, 16, True, 16, method)).dequantize()
            np.testing.assert_allclose(restored, weight, rtol=2.0**-11, atol=2.0**-20)


def test_quantized_values_are_recovered() -> None:
    """From a weight that was quantized before and uses both ends of the range in each block."""
    random = np.random.default_rng(4)
    for bits in (3, 4, 8):
        half = 1 << bits - 1
        q = random.integers(-half, half, (40, 64)).astype(np.int8)
        q.reshape(40, 2, 32)[:, :, :2] = [-half, half - 1]
        scales = random.uniform(0.01, 0.02, (40, 2)).astype(np.float16).astype(np.float32)
        weight = Quantized(q, scales, np.zeros((40, 2), np.float32)).dequantize()
        quantized = round_rows(weight, WeightFormat(bits, 32, method="mse"))
        assert np.array_equal(quantized.q, q)
        np.testing.assert_allclose(quantized.dequantize(), weight, rtol=0, atol=1e-3 * 0.02)


def test_importance_moves_errors_to_unimportant_channels() -> None:
    random = np.random.default_rng(6)
    weight = random.standard_normal((64, 64)).astype(np.float32)
    importance = np.where(np.arange(64) % 8 == 0, 100, 1).astype(np.float32)
    squares = [
        np.square(weight - round_rows(weight, WeightFormat(3, 64, method="mse"), h).dequantize()).astype(np.float64)
        for h in (None, importance)
    ]
    plain, weighted = ((errors * importance).sum() for errors in squares)
    assert weighted < 0.9 * plain
    assert squares[1].sum() > squares[0].sum()
    # Only ratios of importance matter.
    same = round_rows(weight, WeightFormat(3, 64, method="mse"), np.full(64, 4, np.float32))
    assert np.array_equal(same.q, round_rows(weight, WeightFormat(3, 64, method="mse")).q)


def test_channels_without_importance_are_ignored() -> None:
    weight = np.random.default_rng(7).standard_normal((8, 64)).astype(np.float32)
    importance = np.zeros(64, np.float32)
    for count in (0, 1, 32):
        importance[:count] = 1
        quantized = round_rows(weight, WeightFormat(4, 32, method="mse"), importance)
        assert np.isfinite(quantized.scales).all() and np.isfinite(quantized.zero_points).all()
        assert np.abs(quantized.dequantize() - weight)[:, :count].max(initial=0) < 0.5


@pytest.mark.parametrize("size", [1e-30, 1e25, 1e37])
def test_weights_of_any_magnitude_are_quantized(size: float) -> None:
    """Even if their squares exceed the range of float32."""
    weight = (np.random.default_rng(9).standard_normal((64, 64)) * size).astype(np.float32)
    for symmetric in (False, True):
        quantized = round_rows(weight, WeightFormat(4, 32, symmetric, 32, "mse"))
        assert error(weight / np.float32(size), rescaled(quantized, size)) < 0.15


def rescaled(quantized: Quantized, size: float) -> Quantized:
    zero_points = None if quantized.zero_points is None else quantized.zero_points / np.float32(size)
    return Quantized(quantized.q, quantized.scales / np.float32(size), zero_points)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [1, 7, LANES, LANES + 1])
def test_rows_are_independent(method: str, cut: int) -> None:
    """So any thread may quantize any of them."""
    weight = np.random.default_rng(8).standard_t(4, (3 * LANES + 5, 64)).astype(np.float32)
    whole = round_rows(weight, WeightFormat(3, 32, method=method))
    parts = [round_rows(weight[at : at + cut], WeightFormat(3, 32, method=method)) for at in range(0, len(weight), cut)]
    for name in ("q", "scales", "zero_points"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


# float16


@njit
def _stored(values: np.ndarray, half: bool) -> np.ndarray:
    rounded = np.empty_like(values)
    for i in range(len(values)):
        rounded[i] = rounding.stored(values[i], half)
    return rounded


LARGEST = float(np.finfo(np.float16).max)


@cases(short=60)
@given(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=50))
@example([0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-14 - 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504.0])
def test_stored_is_numpys_float16(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert np.array_equal(_stored(array, True), array.astype(np.float16).astype(np.float32))
    assert np.array_equal(_stored(array, False), array)


def test_stored_is_right_for_every_float16_and_between() -> None:
    """All values, the middles between neighbours, and the float32 next to these on either side."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    adjacent = [np.nextafter(middles, np.float32(end)) for end in (0, 1e9)]
    values = np.concatenate([halves, middles, *adjacent])
    values = np.concatenate([values, -values])
    assert np.array_equal(_stored(values, True), values.astype(np.float16).astype(np.float32))
