"""GPTQ (Frantar et al., 2023): round one input channel after another, and let those to come make up for the error.

For a layer with inputs x of second moment H = E[x x^T], the error of its output is (w - q) H (w - q)^T for each row w.
With H^-1 = U^T U, U upper triangular, rounding channel j to q_j costs (w_j - q_j)^2 / U_jj^2 once the channels after it
have been moved by -(w_j - q_j) / U_jj * U_j: so these costs weigh the search for a block's scale, which is made when
its turn comes, for the weights as they then are.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy.linalg.lapack import dtrtri
from threadpoolctl import threadpool_limits

from hf2mnn.core.errors import QuantizationError
from hf2mnn.quant.blob import Levels
from hf2mnn.quant.rounding import LANES, ONE, ZERO, F, least_squares, level_range, search_steps

DAMPING = 0.01
"""Share of H's mean diagonal that is added to the diagonal: few inputs say little about rare directions."""


def check_finite(recorded: np.ndarray, name: str) -> None:
    """Raises QuantizationError where what was recorded of an operator's inputs is not finite."""
    if not np.isfinite(recorded).all():
        raise QuantizationError(f"{name}: its recorded inputs hold NaN or infinite numbers; record them again")


def compensation(second_moment: np.ndarray, name: str) -> np.ndarray:
    """U, float32 [inputs, inputs], of a second moment float32 [inputs, inputs].

    Raises:
        QuantizationError: the recorded inputs are not finite.
    """
    moment = second_moment.astype(np.float64)
    check_finite(moment, name)
    mean = float(np.diag(moment).mean())
    moment[np.diag_indices_from(moment)] += DAMPING * mean if mean else 1.0
    # With rows and columns reversed, H = L L^T gives H^-1 = U^T U for U = L^-1 reversed. One thread: several would sum
    # in another order.
    with threadpool_limits(1):
        lower = np.linalg.cholesky(moment[::-1, ::-1])
        inverse, _ = dtrtri(lower, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1], F)


@njit(nogil=True, cache=True)
def _gptq(rows, block, low, high, symmetric, half, upper, kinds, shares, levels, scales, zeros):
    count, inputs = rows.shape
    tile, errors = np.empty((inputs, LANES), F), np.empty((block, LANES), F)
    least, most, best = np.empty(LANES, F), np.empty(LANES, F), np.empty((4, LANES), F)
    scale, zero, moved = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    importance = np.empty(inputs, F)
    for i in range(inputs):
        importance[i] = ONE / (upper[i, i] * upper[i, i])
    for start in range(0, count, LANES):
        for lane in range(LANES):
            row = min(start + lane, count - 1)
            for i in range(inputs):
                tile[i, lane] = rows[row, i]
        for place in range(inputs // block):
            begin, end = place * block, (place + 1) * block
            for lane in range(LANES):
                least[lane] = most[lane] = tile[begin, lane]
            for i in range(begin + 1, end):
                for lane in range(LANES):
                    least[lane] = min(least[lane], tile[i, lane])
                    most[lane] = max(most[lane], tile[i, lane])
            least_squares(
                tile[begin:end],
                importance[begin:end],
                least,
                most,
                low,
                high,
                symmetric,
                half,
                kinds,
                shares,
                best,
                scale,
                zero,
            )
            for i in range(begin, end):
                for lane in range(LANES):
                    inverse = ONE / scale[lane] if scale[lane] > ZERO else ZERO
                    level = min(max(np.rint((tile[i, lane] - zero[lane]) * inverse), low), high)
                    errors[i - begin, lane] = (tile[i, lane] - (level * scale[lane] + zero[lane])) / upper[i, i]
                    if start + lane < count:
                        levels[start + lane, i] = np.int8(level)
                for k in range(i + 1, end):
                    for lane in range(LANES):
                        tile[k, lane] -= errors[i - begin, lane] * upper[i, k]
            for lane in range(min(LANES, count - start)):
                scales[start + lane, place], zeros[start + lane, place] = scale[lane], zero[lane]
            # What is beyond the block is moved once for all of it.
            for k in range(end, inputs):
                for lane in range(LANES):
                    moved[lane] = ZERO
                for i in range(begin, end):
                    for lane in range(LANES):
                        moved[lane] += errors[i - begin, lane] * upper[i, k]
                for lane in range(LANES):
                    tile[k, lane] -= moved[lane]


def gptq_rows(rows: np.ndarray, bits: int, block: int, symmetric: bool, scale_bits: int, upper: np.ndarray) -> Levels:
    """Quantize rows of a weight, float32 [rows, inputs], each by itself; `upper` comes from `compensation`."""
    count, inputs = rows.shape
    block = block or inputs
    shape = (count, inputs // block)
    levels, scales, zeros = np.empty((count, inputs), np.int8), np.empty(shape, F), np.empty(shape, F)
    low, high = level_range(bits)
    kinds, shares = search_steps(bits, symmetric, even=bool(np.ptp(np.diag(upper)) == 0))
    half = scale_bits == 16
    rows = np.ascontiguousarray(rows, F)
    _gptq(rows, block, low, high, symmetric, half, upper, kinds, shares, levels, scales, zeros)
    return Levels(levels, scales, None if symmetric else zeros)
