"""GPTQ against its definition, channel by channel in float64, and the error of outputs, which it reduces."""

from __future__ import annotations

import numpy as np
import pytest

from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.blob import Quantized
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.gptq import DAMPING, gptq_rows, inverse_cholesky
from hf2mnn.quant.rounding import LANES, round_rows

INPUTS, OUTPUTS = 128, 96


def correlated(seed: int = 0, inputs: int = INPUTS, spread: float = 1.5) -> np.ndarray:
    """Return H, float32 [inputs, inputs], of inputs that share directions and differ in size."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((inputs, inputs)) * np.exp(-np.arange(inputs) / (inputs / 8))
    rows = random.standard_normal((2048, inputs)) @ mixing.T + 0.1 * random.standard_normal((2048, inputs))
    rows *= np.exp(random.uniform(-spread, spread, inputs))
    return (rows.T @ rows / len(rows)).astype(np.float32)


@pytest.fixture(scope="module")
def H() -> np.ndarray:
    return correlated()


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_t(5, (OUTPUTS, INPUTS)).astype(np.float32)


def output_error(weight: np.ndarray, quantized: Quantized, H: np.ndarray) -> float:
    error = weight.astype(np.float64) - quantized.dequantize()
    return float(np.einsum("ri,ij,rj->", error, H.astype(np.float64), error))


def damped(H: np.ndarray) -> np.ndarray:
    return H.astype(np.float64) + DAMPING * np.diag(H).astype(np.float64).mean() * np.eye(len(H))


# Cholesky factor


def test_hinv_is_the_cholesky_factor_of_the_inverse(H: np.ndarray) -> None:
    Hinv = inverse_cholesky(H, "layer")
    assert Hinv.dtype == np.float32
    assert np.array_equal(Hinv, np.triu(Hinv))
    product = Hinv.T.astype(np.float64) @ Hinv @ damped(H)
    np.testing.assert_allclose(product, np.eye(INPUTS), atol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(H: np.ndarray, value: float) -> None:
    damaged = H.copy()
    damaged[3, 4] = value
    with pytest.raises(QuantizationError, match=r"^some\.layer: .*NaN or infinite"):
        inverse_cholesky(damaged, "some.layer")


def test_unused_inputs(weight: np.ndarray, H: np.ndarray) -> None:
    """Dead channels give no NaN, and the others have the usual gain."""
    dead = H.copy()
    dead[::5], dead[:, ::5] = 0, 0
    quantized = gptq_rows(weight, WeightFormat(4, 32), inverse_cholesky(dead, "layer"))
    plain = round_rows(weight, WeightFormat(4, 32, method="mse"))
    assert np.isfinite(quantized.dequantize()).all()
    assert output_error(weight, quantized, dead) < 0.5 * output_error(weight, plain, dead)


def test_inputs_of_zeros_give_the_result_of_mse(weight: np.ndarray, H: np.ndarray) -> None:
    quantized = gptq_rows(weight, WeightFormat(4, 32), inverse_cholesky(np.zeros_like(H), "layer"))
    assert np.array_equal(quantized.q, round_rows(weight, WeightFormat(4, 32, method="mse")).q)


def test_few_inputs_reduce_the_error_too(weight: np.ndarray) -> None:
    """With fewer rows than channels, H has no inverse without damping."""
    rows = np.random.default_rng(2).standard_normal((7, INPUTS)).astype(np.float32)
    H = rows.T @ rows / len(rows)
    quantized = gptq_rows(weight, WeightFormat(4, 32), inverse_cholesky(H, "layer"))
    plain = round_rows(weight, WeightFormat(4, 32, method="mse"))
    assert output_error(weight, quantized, H) < 0.5 * output_error(weight, plain, H)


# Errors of outputs


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_have_smaller_errors_than_with_mse(
    weight: np.ndarray, H: np.ndarray, bits: int, block: int, symmetric: bool
) -> None:
    shape = (bits, block, symmetric, 16)
    plain = round_rows(weight, WeightFormat(*shape, "mse"))
    quantized = gptq_rows(weight, WeightFormat(*shape), inverse_cholesky(H, "layer"))
    assert output_error(weight, quantized, H) < 0.7 * output_error(weight, plain, H)


def test_uncorrelated_equal_inputs_give_the_result_of_mse(weight: np.ndarray) -> None:
    for bits in (2, 4):
        quantized = gptq_rows(
            weight, WeightFormat(bits, 32), inverse_cholesky(np.eye(INPUTS, dtype=np.float32), "layer")
        )
        plain = round_rows(weight, WeightFormat(bits, 32, method="mse"))
        # Damping multiplies all costs by 1.01, with which a search may end in another optimum.
        assert (quantized.q == plain.q).mean() > 0.995
        errors = [np.square(weight - each.dequantize()).sum() for each in (quantized, plain)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def compensated(weight: np.ndarray, quantized: Quantized, H: np.ndarray) -> np.ndarray:
    """Return each channel as it was when it was quantized, float64, with the errors of those before it compensated.

    Source: Frantar et al., algorithm 1, without its blocks.
    """
    Hinv = np.linalg.cholesky(np.linalg.inv(damped(H))).T
    W, before = weight.astype(np.float64), np.empty(weight.shape)
    restored = quantized.dequantize().astype(np.float64)
    for channel in range(weight.shape[1]):
        before[:, channel] = W[:, channel]
        error = (W[:, channel] - restored[:, channel]) / Hinv[channel, channel]
        W[:, channel:] -= error[:, None] * Hinv[channel, channel:]
    return before


@pytest.mark.parametrize(("bits", "block", "symmetric"), [(4, 32, False), (3, 0, False), (2, 64, True), (8, 128, True)])
def test_each_q_is_the_nearest_to_the_compensated_weight(
    weight: np.ndarray, H: np.ndarray, bits: int, block: int, symmetric: bool
) -> None:
    """Within the precision of float32, a thousandth of a step."""
    quantized = gptq_rows(weight, WeightFormat(bits, block, symmetric, 16), inverse_cholesky(H, "layer"))
    before = compensated(weight, quantized, H)
    each = INPUTS // quantized.scales.shape[1]
    s = np.repeat(quantized.scales.astype(np.float64), each, axis=1)
    z = 0 if quantized.zero_points is None else np.repeat(quantized.zero_points.astype(np.float64), each, axis=1)
    half = 1 << bits - 1
    exact = np.clip((before - z) / s, -half, half - 1)
    assert np.abs(exact - quantized.q).max() < 0.505
    assert (np.rint(exact) == quantized.q).mean() > 0.999


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_blocks_scale_is_searched_when_the_block_begins(weight: np.ndarray, H: np.ndarray, symmetric: bool) -> None:
    """For the compensated weights, each weighted by the cost of its error."""
    block = 32
    quantized = gptq_rows(weight, WeightFormat(3, block, symmetric, 16), inverse_cholesky(H, "layer"))
    Hinv = np.linalg.cholesky(np.linalg.inv(damped(H))).T
    costs = 1 / np.square(np.diag(Hinv))
    W, restored = weight.astype(np.float64), quantized.dequantize().astype(np.float64)
    for index, begin in enumerate(range(0, INPUTS, block)):
        span = slice(begin, begin + block)
        rows, importance = W[:, span].astype(np.float32), costs[span].astype(np.float32)
        searched = round_rows(rows, WeightFormat(3, block, symmetric, 16, "mse"), importance)
        close = np.isclose(searched.scales[:, 0], quantized.scales[:, index], rtol=2e-3)
        assert close.mean() > 0.95, index
        for channel in range(begin, begin + block):
            error = (W[:, channel] - restored[:, channel]) / Hinv[channel, channel]
            W[:, channel:] -= error[:, None] * Hinv[channel, channel:]


# Interface


@pytest.mark.parametrize("cut", [1, 13, LANES])
def test_rows_are_independent(weight: np.ndarray, H: np.ndarray, cut: int) -> None:
    Hinv = inverse_cholesky(H, "layer")
    whole = gptq_rows(weight, WeightFormat(4, 32), Hinv)
    parts = [gptq_rows(weight[at : at + cut], WeightFormat(4, 32), Hinv) for at in range(0, OUTPUTS, cut)]
    for name in ("q", "scales", "zero_points"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("scale_bits", [16, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_results_can_be_stored(weight: np.ndarray, H: np.ndarray, scale_bits: int, symmetric: bool) -> None:
    Hinv = inverse_cholesky(H, "layer")
    for bits in (2, 5, 8):
        quantized = gptq_rows(weight, WeightFormat(bits, 64, symmetric, scale_bits), Hinv)
        assert quantized.q.min() >= -(1 << bits - 1) and quantized.q.max() < 1 << bits - 1
        assert (quantized.zero_points is None) == symmetric
        for part in (quantized.scales, *([] if symmetric else [quantized.zero_points])):
            assert np.isfinite(part).all()
            if scale_bits == 16:
                assert np.array_equal(part, part.astype(np.float16).astype(np.float32))


def test_the_argument_is_not_changed(weight: np.ndarray, H: np.ndarray) -> None:
    before = weight.copy()
    gptq_rows(weight, WeightFormat(4, 32), inverse_cholesky(H, "layer"))
    assert np.array_equal(weight, before)
