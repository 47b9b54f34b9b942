"""Scales and levels: the plain methods are the converter's, and the search is better, whatever the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit

from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.bundle import DECODER, convert_decoder
from hf2mnn.mnn.convert import WeightFormat, read_graph
from hf2mnn.quant import rounding, write
from hf2mnn.quant.blob import Levels
from hf2mnn.quant.names import module_names
from hf2mnn.quant.rounding import LANES, round_rows
from hf2mnn.quant.weights import Operator, WeightFile, operators
from one_layer import convert

METHODS = ("rtn", "hqq", "mse")


def error(weight: np.ndarray, levels: Levels) -> float:
    """Relative to the weight."""
    return float(np.linalg.norm(weight.astype(np.float64) - levels.dequantize()) / np.linalg.norm(weight))


def block_errors(weight: np.ndarray, levels: Levels) -> np.ndarray:
    """Sums of squares, float64 [rows, blocks]."""
    squares = np.square(weight.astype(np.float64) - levels.dequantize())
    return squares.reshape(*levels.scales.shape, -1).sum(axis=2)


def from_converter(folder: Path, weight: np.ndarray, form: WeightFormat) -> Levels:
    model = convert(folder, {"layer": weight}, form)
    return model.weights.levels(model.by_name["layer"])


def toward_zero(values: np.ndarray) -> np.ndarray:
    """float32 values cut to half floats, as float32: how the converter stores scales."""
    halves = values.astype(np.float16)
    over = np.abs(halves.astype(np.float32)) > np.abs(values)
    return np.where(over, np.nextafter(halves, np.float16(0)), halves).astype(np.float32)


# The converter's methods


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return (0.05 * np.random.default_rng(0).standard_t(5, (96, 128))).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_round_to_nearest_is_the_converters(weight: np.ndarray, tmp_path: Path, bits: int, symmetric: bool) -> None:
    """Float scales to the last bit; half floats are the nearest here, cut in the converter. Levels are its own but for
    weights in the middle between two, where its division and its round() go another way.
    """
    for block in (0, 32):
        theirs = from_converter(tmp_path / f"{block}", weight, WeightFormat(bits, block, symmetric, 32))
        cut = from_converter(tmp_path / f"{block}-half", weight, WeightFormat(bits, block, symmetric, 16))
        ours = round_rows(weight, bits, block, symmetric, 32, "rtn")
        halves = round_rows(weight, bits, block, symmetric, 16, "rtn")
        assert np.array_equal(ours.scales, theirs.scales)
        assert np.array_equal(cut.scales, toward_zero(theirs.scales))
        assert np.array_equal(halves.scales, ours.scales.astype(np.float16).astype(np.float32))
        assert np.array_equal(cut.levels, theirs.levels)
        assert np.array_equal(halves.levels, ours.levels)

        blocks = (*ours.scales.shape, -1)
        zeros = 0.0 if ours.zeros is None else ours.zeros[:, :, None]
        exact = (weight.reshape(blocks) - zeros) / ours.scales[:, :, None]
        apart = np.abs(ours.levels.reshape(blocks).astype(int) - theirs.levels.reshape(blocks))
        halfway = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
        assert apart.max() <= 1
        assert not apart[~halfway].any()
        assert error(weight, ours) == pytest.approx(error(weight, theirs), rel=1e-4)
        # Ours stores the weight at level 0, a smaller number than that at the lowest level.
        assert error(weight, halves) <= 1.001 * error(weight, cut)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_half_quadratic_is_the_converters(weight: np.ndarray, tmp_path: Path, bits: int) -> None:
    for block in (0, 64):
        for scale_bits, near in ((32, 0.002), (16, 0.02)):
            form = WeightFormat(bits, block, False, scale_bits, "hqq")
            theirs = from_converter(tmp_path / f"{block}-{scale_bits}", weight, form)
            ours = round_rows(weight, bits, block, False, scale_bits, "hqq")
            assert error(weight, ours) == pytest.approx(error(weight, theirs), rel=near)
            assert (ours.levels == theirs.levels).mean() > 0.99
            np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-6 if scale_bits == 32 else 1e-3)


def test_every_layer_of_a_model_is_rounded_as_the_converter_does(
    onnx_folder: Path, bundle: Path, tmp_path: Path
) -> None:
    form = WeightFormat(4, 64)
    convert_decoder(onnx_folder, tmp_path, 2, form)
    names = module_names(onnx_folder / "decoder.onnx")
    theirs, floats = read_graph(tmp_path / DECODER), read_graph(bundle / DECODER)
    file, weights = WeightFile(theirs, tmp_path / f"{DECODER}.weight"), WeightFile(floats, bundle / f"{DECODER}.weight")
    layers = operators(floats, names)
    assert len(layers) == 15
    for operator, packed in zip(layers, operators(theirs, names), strict=True):
        assert operator.name == packed.name
        rows = weights.rows(operator)
        ours = round_rows(rows, form.bits, form.block, form.symmetric, form.scale_bits, "rtn")
        assert error(rows, ours) == pytest.approx(error(rows, file.levels(packed)), rel=1e-3), operator.name


# The search


@pytest.fixture(scope="module")
def heavy() -> np.ndarray:
    """1024 x 1536 from Student's t, 6 degrees of freedom: what facts/mnn.md gives figures for."""
    return np.random.default_rng(0).standard_t(6, (1024, 1536)).astype(np.float32)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0975), (3, 0.197), (2, 0.375)])
def test_least_squares_beats_both_by_what_was_measured(heavy: np.ndarray, bits: int, bound: float) -> None:
    found = {method: round_rows(heavy, bits, 64, False, 16, method) for method in METHODS}
    errors = {method: error(heavy, levels) for method, levels in found.items()}
    assert errors["mse"] <= bound
    assert errors["mse"] < errors["hqq"] < errors["rtn"]
    made, plain, half_quadratic = (block_errors(heavy, found[method]) for method in ("mse", "rtn", "hqq"))
    assert (made <= (1 + 1e-5) * plain).all()
    # Each is a search: of some blocks the other finds the better zero point.
    assert (made <= half_quadratic).mean() > 0.9


@pytest.mark.parametrize(("bits", "block"), [(2, 64), (3, 64), (4, 64), (4, 0)])
def test_the_short_search_is_as_good_where_all_weights_count_the_same(heavy: np.ndarray, bits: int, block: int) -> None:
    """A third of the steps. An importance that is nearly even asks for the whole search."""
    rows, nearly = heavy[:256], np.ones(1536, np.float32)
    nearly[0] = np.nextafter(np.float32(1), np.float32(2))
    short, whole = (round_rows(rows, bits, block, False, 16, "mse", given) for given in (None, nearly))
    assert error(rows, whole) < error(rows, short) < 1.01 * error(rows, whole)


@st.composite
def blocks(draw: st.DrawFn) -> np.ndarray:
    """float32 [3, 32], two blocks of 16 a row, of any size: constant, with an outlier, sparse, of one sign, ..."""
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


@settings(max_examples=1500, deadline=None)
@given(weight=blocks(), **SHAPES)
def test_no_block_is_worse_than_rounded_to_nearest(
    weight: np.ndarray, bits: int, symmetric: bool, scale_bits: int
) -> None:
    plain, found = (
        block_errors(weight, round_rows(weight, bits, 16, symmetric, scale_bits, method)) for method in ("rtn", "mse")
    )
    # Errors are summed in float32; and small half floats are 2^-24 apart, so that scales are what they are by luck.
    slack = 1e-5 * plain + 1e-12 * np.square(weight.astype(np.float64)).reshape(3, 2, -1).sum(axis=2)
    slack += 16 * (2.0 ** (bits - 26)) ** 2 if scale_bits == 16 else 0
    assert (found <= plain + slack).all()


@settings(max_examples=200, deadline=None)
@given(weight=blocks(), method=st.sampled_from(METHODS), **SHAPES)
@example(
    weight=np.linspace(-1e5, 3e5, 96, dtype=np.float32).reshape(3, 32),
    bits=2,
    symmetric=False,
    scale_bits=16,
    method="mse",
)
def test_what_is_made_can_be_stored(
    weight: np.ndarray, bits: int, symmetric: bool, scale_bits: int, method: str
) -> None:
    """Or is refused before it is: a half float ends at 65504."""
    symmetric = symmetric and method != "hqq"
    found = round_rows(weight, bits, 16, symmetric, scale_bits, method)
    assert found.levels.dtype == np.int8 and found.levels.shape == weight.shape
    assert found.levels.min() >= -(1 << bits - 1) and found.levels.max() < 1 << bits - 1
    assert (found.zeros is None) == symmetric
    parts = [found.scales, *([] if symmetric else [found.zeros])]
    for part in parts:
        assert part.shape == (3, 2) and part.dtype == np.float32
        assert np.isfinite(part).all()
    assert np.isfinite(found.dequantize()).all()
    if scale_bits == 16 and max(np.abs(part).max() for part in parts) > 65504:
        form = WeightFormat(bits, 16, symmetric, scale_bits, method)
        with pytest.raises(QuantizationError, match="layer: its scales are too large for half floats"):
            write._level_rows(weight, found, Operator("layer", 3, 32, 1, (), None), form, 1.0)
    elif scale_bits == 16:
        assert all(np.array_equal(part, part.astype(np.float16).astype(np.float32)) for part in parts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, 2.0**-20])
def test_a_constant_block_keeps_its_value(method: str, value: float) -> None:
    """A pruned or an untrained channel. Nothing need be lost of a number that a half float can hold; hqq has no scale
    below 1e-7, and a quarter of a step of it to spare.
    """
    weight = np.full((5, 32), value, np.float32)
    for bits in (2, 4, 8):
        found = round_rows(weight, bits, 16, False, 16, method).dequantize()
        if method == "hqq":
            np.testing.assert_allclose(found, weight, rtol=1e-3, atol=2.0**-24)
        else:
            assert np.array_equal(found, weight)
            # Symmetric, a level times a half float, which has 11 bits; of 127 levels one as small as 2^-27 has none.
            found = round_rows(weight, bits, 16, True, 16, method).dequantize()
            np.testing.assert_allclose(found, weight, rtol=2.0**-11, atol=2.0**-20)


def test_levels_that_are_there_are_found_again() -> None:
    """A weight that was quantized already, and uses both ends of each block, is left as it is."""
    random = np.random.default_rng(4)
    for bits in (3, 4, 8):
        half = 1 << bits - 1
        levels = random.integers(-half, half, (40, 64)).astype(np.int8)
        levels.reshape(40, 2, 32)[:, :, :2] = [-half, half - 1]
        scales = random.uniform(0.01, 0.02, (40, 2)).astype(np.float16).astype(np.float32)
        zeros = np.zeros((40, 2), np.float32)
        weight = Levels(levels, scales, zeros).dequantize()
        found = round_rows(weight, bits, 32, False, 16, "mse")
        assert np.array_equal(found.levels, levels)
        np.testing.assert_allclose(found.dequantize(), weight, rtol=0, atol=1e-3 * 0.02)


def test_importance_moves_errors_where_they_weigh_less() -> None:
    random = np.random.default_rng(6)
    weight = random.standard_normal((64, 64)).astype(np.float32)
    importance = np.where(np.arange(64) % 8 == 0, 100, 1).astype(np.float32)
    squares = [
        np.square(weight - round_rows(weight, 3, 64, False, 16, "mse", weighed).dequantize()).astype(np.float64)
        for weighed in (None, importance)
    ]
    plain, weighed = ((made * importance).sum() for made in squares)
    assert weighed < 0.9 * plain
    assert squares[1].sum() > squares[0].sum()
    # Only what is important relative to the others counts, and that all of it is.
    same = round_rows(weight, 3, 64, False, 16, "mse", np.full(64, 4, np.float32))
    assert np.array_equal(same.levels, round_rows(weight, 3, 64, False, 16, "mse").levels)


def test_channels_of_no_importance_do_no_harm() -> None:
    weight = np.random.default_rng(7).standard_normal((8, 64)).astype(np.float32)
    importance = np.zeros(64, np.float32)
    for count in (0, 1, 32):
        importance[:count] = 1
        found = round_rows(weight, 4, 32, False, 16, "mse", importance)
        assert np.isfinite(found.scales).all() and np.isfinite(found.zeros).all()
        assert np.abs(found.dequantize() - weight)[:, :count].max(initial=0) < 0.5


@pytest.mark.parametrize("size", [1e-30, 1e25, 1e37])
def test_weights_of_any_size_are_searched(size: float) -> None:
    """Beyond what squares in float32 hold: not good for anything, but not garbage either."""
    weight = (np.random.default_rng(9).standard_normal((64, 64)) * size).astype(np.float32)
    for symmetric in (False, True):
        found = round_rows(weight, 4, 32, symmetric, 32, "mse")
        assert error(weight / np.float32(size), rescaled(found, size)) < 0.15


def rescaled(levels: Levels, size: float) -> Levels:
    zeros = None if levels.zeros is None else levels.zeros / np.float32(size)
    return Levels(levels.levels, levels.scales / np.float32(size), zeros)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [1, 7, LANES, LANES + 1])
def test_rows_are_rounded_each_by_itself(method: str, cut: int) -> None:
    """However they are cut into calls: so any thread may take any of them."""
    weight = np.random.default_rng(8).standard_t(4, (3 * LANES + 5, 64)).astype(np.float32)
    whole = round_rows(weight, 3, 32, False, 16, method)
    parts = [round_rows(weight[at : at + cut], 3, 32, False, 16, method) for at in range(0, len(weight), cut)]
    for name in ("levels", "scales", "zeros"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


# Half floats


@njit
def _stored(values: np.ndarray, half: bool) -> np.ndarray:
    found = np.empty_like(values)
    for i in range(len(values)):
        found[i] = rounding.stored(values[i], half)
    return found


LARGEST = float(np.finfo(np.float16).max)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.floats(-LARGEST, LARGEST, width=32), min_size=1, max_size=50))
@example([0.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-14 - 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504.0])
def test_stored_is_numpys_half_float(values: list[float]) -> None:
    given = np.array(values, np.float32)
    assert np.array_equal(_stored(given, True), given.astype(np.float16).astype(np.float32))
    assert np.array_equal(_stored(given, False), given)


def test_stored_is_right_for_every_half_float_and_between() -> None:
    """All of them, the middles between neighbours, and a step of float32 to either side of those."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    beside = [np.nextafter(middles, np.float32(end)) for end in (0, 1e9)]
    values = np.concatenate([halves, middles, *beside])
    values = np.concatenate([values, -values])
    assert np.array_equal(_stored(values, True), values.astype(np.float16).astype(np.float32))
