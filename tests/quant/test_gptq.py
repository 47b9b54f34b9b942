"""GPTQ against its definition, column by column in float64, and against what it is for: the error of outputs."""

from __future__ import annotations

import numpy as np
import pytest

from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.blob import Levels
from hf2mnn.quant.gptq import DAMPING, compensation, gptq_rows
from hf2mnn.quant.rounding import LANES, round_rows

INPUTS, OUTPUTS = 128, 96


def correlated(seed: int = 0, inputs: int = INPUTS, spread: float = 1.5) -> np.ndarray:
    """Second moment float32 [inputs, inputs] of inputs that share directions and differ in size."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((inputs, inputs)) * np.exp(-np.arange(inputs) / (inputs / 8))
    rows = random.standard_normal((2048, inputs)) @ mixing.T + 0.1 * random.standard_normal((2048, inputs))
    rows *= np.exp(random.uniform(-spread, spread, inputs))
    return (rows.T @ rows / len(rows)).astype(np.float32)


@pytest.fixture(scope="module")
def moment() -> np.ndarray:
    return correlated()


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_t(5, (OUTPUTS, INPUTS)).astype(np.float32)


def output_error(weight: np.ndarray, levels: Levels, moment: np.ndarray) -> float:
    error = weight.astype(np.float64) - levels.dequantize()
    return float(np.einsum("ri,ij,rj->", error, moment.astype(np.float64), error))


def damped(moment: np.ndarray) -> np.ndarray:
    return moment.astype(np.float64) + DAMPING * np.diag(moment).astype(np.float64).mean() * np.eye(len(moment))


# What makes up for errors


def test_compensation_is_the_root_of_the_inverse(moment: np.ndarray) -> None:
    upper = compensation(moment, "layer")
    assert upper.dtype == np.float32
    assert np.array_equal(upper, np.triu(upper))
    product = upper.T.astype(np.float64) @ upper @ damped(moment)
    np.testing.assert_allclose(product, np.eye(INPUTS), atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_no_numbers_are_refused(moment: np.ndarray, value: float) -> None:
    spoilt = moment.copy()
    spoilt[3, 4] = value
    with pytest.raises(QuantizationError, match=r"^some\.layer: .*NaN or infinite"):
        compensation(spoilt, "some.layer")


def test_inputs_that_are_never_used(weight: np.ndarray, moment: np.ndarray) -> None:
    """Dead channels: no NaN, and the rest is as good as without them."""
    dead = moment.copy()
    dead[::5], dead[:, ::5] = 0, 0
    found = gptq_rows(weight, 4, 32, False, 16, compensation(dead, "layer"))
    plain = round_rows(weight, 4, 32, False, 16, "mse")
    assert np.isfinite(found.dequantize()).all()
    assert output_error(weight, found, dead) < 0.5 * output_error(weight, plain, dead)


def test_inputs_that_are_all_zero_leave_the_plain_search(weight: np.ndarray, moment: np.ndarray) -> None:
    found = gptq_rows(weight, 4, 32, False, 16, compensation(np.zeros_like(moment), "layer"))
    assert np.array_equal(found.levels, round_rows(weight, 4, 32, False, 16, "mse").levels)


def test_few_inputs_say_little_but_do_no_harm(weight: np.ndarray) -> None:
    """Fewer rows than channels: their second moment has no inverse of its own."""
    rows = np.random.default_rng(2).standard_normal((7, INPUTS)).astype(np.float32)
    moment = rows.T @ rows / len(rows)
    found = gptq_rows(weight, 4, 32, False, 16, compensation(moment, "layer"))
    plain = round_rows(weight, 4, 32, False, 16, "mse")
    assert output_error(weight, found, moment) < 0.5 * output_error(weight, plain, moment)


# What it is for


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_are_closer_than_by_the_weights_alone(
    weight: np.ndarray, moment: np.ndarray, bits: int, block: int, symmetric: bool
) -> None:
    shape = (bits, block, symmetric, 16)
    plain = round_rows(weight, *shape, "mse")
    found = gptq_rows(weight, *shape, compensation(moment, "layer"))
    assert output_error(weight, found, moment) < 0.7 * output_error(weight, plain, moment)


def test_inputs_that_are_alike_leave_nothing_to_make_up(weight: np.ndarray) -> None:
    for bits in (2, 4):
        found = gptq_rows(weight, bits, 32, False, 16, compensation(np.eye(INPUTS, dtype=np.float32), "layer"))
        plain = round_rows(weight, bits, 32, False, 16, "mse")
        # Damping weighs all by 1.01, by which a search may end elsewhere.
        assert (found.levels == plain.levels).mean() > 0.995
        errors = [np.square(weight - levels.dequantize()).sum() for levels in (found, plain)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def followed(weight: np.ndarray, levels: Levels, moment: np.ndarray) -> np.ndarray:
    """The weights as each stood when its turn came, float64: every channel's error spread over those after it, by the
    definition (Frantar et al., algorithm 1, without its blocks).
    """
    inverse = np.linalg.inv(damped(moment))
    upper = np.linalg.cholesky(inverse).T
    moving, stood, made = weight.astype(np.float64), np.empty(weight.shape), levels.dequantize().astype(np.float64)
    for channel in range(weight.shape[1]):
        stood[:, channel] = moving[:, channel]
        error = (moving[:, channel] - made[:, channel]) / upper[channel, channel]
        moving[:, channel:] -= error[:, None] * upper[channel, channel:]
    return stood


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 32, False), (3, 0, False), (2, 64, True), (8, 128, True)])
def test_each_level_is_the_nearest_to_what_was_left_to_round(
    weight: np.ndarray, moment: np.ndarray, bits: int, block: int, symmetric: bool
) -> None:
    """With the scales that were found. Within what float32 loses, a thousandth of a step: more for large steps."""
    found = gptq_rows(weight, bits, block, symmetric, 16, compensation(moment, "layer"))
    stood = followed(weight, found, moment)
    each = INPUTS // found.scales.shape[1]
    scales = np.repeat(found.scales.astype(np.float64), each, axis=1)
    zeros = 0 if found.zeros is None else np.repeat(found.zeros.astype(np.float64), each, axis=1)
    half = 1 << bits - 1
    wanted = np.clip((stood - zeros) / scales, -half, half - 1)
    assert np.abs(wanted - found.levels).max() < 0.505
    naive = np.rint(wanted)
    assert (naive == found.levels).mean() > 0.999


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_blocks_scale_is_searched_when_its_turn_comes(
    weight: np.ndarray, moment: np.ndarray, symmetric: bool
) -> None:
    """For the weights as they then are, each weighed by what its error costs."""
    block = 32
    found = gptq_rows(weight, 3, block, symmetric, 16, compensation(moment, "layer"))
    upper = np.linalg.cholesky(np.linalg.inv(damped(moment))).T
    costs = 1 / np.square(np.diag(upper))
    made = found.dequantize().astype(np.float64)
    moving = weight.astype(np.float64)
    for place, begin in enumerate(range(0, INPUTS, block)):
        span = slice(begin, begin + block)
        stands = moving[:, span].astype(np.float32)
        searched = round_rows(stands, 3, block, symmetric, 16, "mse", costs[span].astype(np.float32))
        alike = np.isclose(searched.scales[:, 0], found.scales[:, place], rtol=2e-3)
        assert alike.mean() > 0.95, place
        for channel in range(begin, begin + block):
            error = (moving[:, channel] - made[:, channel]) / upper[channel, channel]
            moving[:, channel:] -= error[:, None] * upper[channel, channel:]


# How it is called


@pytest.mark.parametrize("cut", [1, 13, LANES])
def test_rows_are_rounded_each_by_itself(weight: np.ndarray, moment: np.ndarray, cut: int) -> None:
    upper = compensation(moment, "layer")
    whole = gptq_rows(weight, 4, 32, False, 16, upper)
    parts = [gptq_rows(weight[at : at + cut], 4, 32, False, 16, upper) for at in range(0, OUTPUTS, cut)]
    for name in ("levels", "scales", "zeros"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("scale_bits", [16, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_made_can_be_stored(weight: np.ndarray, moment: np.ndarray, scale_bits: int, symmetric: bool) -> None:
    upper = compensation(moment, "layer")
    for bits in (2, 5, 8):
        found = gptq_rows(weight, bits, 64, symmetric, scale_bits, upper)
        assert found.levels.min() >= -(1 << bits - 1) and found.levels.max() < 1 << bits - 1
        assert (found.zeros is None) == symmetric
        for part in (found.scales, *([] if symmetric else [found.zeros])):
            assert np.isfinite(part).all()
            if scale_bits == 16:
                assert np.array_equal(part, part.astype(np.float16).astype(np.float32))


def test_the_weight_that_is_given_is_left_as_it_is(weight: np.ndarray, moment: np.ndarray) -> None:
    before = weight.copy()
    gptq_rows(weight, 4, 32, False, 16, compensation(moment, "layer"))
    assert np.array_equal(weight, before)
