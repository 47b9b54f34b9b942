"""GPTQ (Frantar et al., 2023): quantize input channels one by one, and compensate each error in those that follow.

For a layer with inputs x and H = E[x x^T], the output error of a row w is (w - q) H (w - q)^T. Let Hinv be the upper
Cholesky factor of the inverse, H^-1 = Hinv^T Hinv. Quantizing channel j costs (w_j - q_j)^2 / Hinv_jj^2 once the
channels after j have been changed by -(w_j - q_j) / Hinv_jj * Hinv_j. These costs are the weights of the search for a
block's scale, which is made with the weights as they are when the block begins.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy.linalg.lapack import dtrtri
from threadpoolctl import threadpool_limits

from hf2mnn.quant.blob import Quantized
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.layer_inputs import Activations, Calibrated, check_finite
from hf2mnn.quant.rounding import LANES, ONE, ZERO, F, RoundRows, q_range, search_scales, search_steps
from hf2mnn.quant.weights import Operator

DAMPING = 0.01
"""Share of H's mean diagonal that is added to its diagonal: few inputs say little about rare directions."""


def inverse_cholesky(H: np.ndarray, name: str) -> np.ndarray:
    """Return Hinv of H with damping, both float32 [inputs, inputs].

    Raises:
        QuantizationError: H of the operator `name` is not finite.
    """
    H = H.astype(np.float64)
    check_finite(H, name)
    mean = float(np.diag(H).mean())
    H[np.diag_indices_from(H)] += DAMPING * mean if mean else 1.0
    # With rows and columns in reverse order, H = L L^T gives Hinv = L^-1 in reverse order. One thread: several would
    # sum in another order.
    with threadpool_limits(1):
        L = np.linalg.cholesky(H[::-1, ::-1])
        inverse, _ = dtrtri(L, lower=1)
    return np.ascontiguousarray(inverse[::-1, ::-1], F)


@njit(nogil=True, cache=True)
def _gptq(rows, block, low, high, symmetric, half, Hinv, steps, shares, q, scales, zero_points):
    count, inputs = rows.shape
    W, errors = np.empty((inputs, LANES), F), np.empty((block, LANES), F)
    w_min, w_max, best = np.empty(LANES, F), np.empty(LANES, F), np.empty((4, LANES), F)
    s, z, change = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    costs = np.empty(inputs, F)
    for i in range(inputs):
        costs[i] = ONE / (Hinv[i, i] * Hinv[i, i])
    for start in range(0, count, LANES):
        for lane in range(LANES):
            row = min(start + lane, count - 1)
            for i in range(inputs):
                W[i, lane] = rows[row, i]
        for index in range(inputs // block):
            begin, end = index * block, (index + 1) * block
            for lane in range(LANES):
                w_min[lane] = w_max[lane] = W[begin, lane]
            for i in range(begin + 1, end):
                for lane in range(LANES):
                    w_min[lane] = min(w_min[lane], W[i, lane])
                    w_max[lane] = max(w_max[lane], W[i, lane])
            tile, h = W[begin:end], costs[begin:end]
            search_scales(tile, h, w_min, w_max, low, high, symmetric, half, steps, shares, best, s, z)
            for i in range(begin, end):
                for lane in range(LANES):
                    inverse = ONE / s[lane] if s[lane] > ZERO else ZERO
                    value = min(max(np.rint((W[i, lane] - z[lane]) * inverse), low), high)
                    errors[i - begin, lane] = (W[i, lane] - (value * s[lane] + z[lane])) / Hinv[i, i]
                    if start + lane < count:
                        q[start + lane, i] = np.int8(value)
                for k in range(i + 1, end):
                    for lane in range(LANES):
                        W[k, lane] -= errors[i - begin, lane] * Hinv[i, k]
            for lane in range(min(LANES, count - start)):
                scales[start + lane, index], zero_points[start + lane, index] = s[lane], z[lane]
            # Channels after the block are changed once, by the errors of the whole block.
            for k in range(end, inputs):
                for lane in range(LANES):
                    change[lane] = ZERO
                for i in range(begin, end):
                    for lane in range(LANES):
                        change[lane] += errors[i - begin, lane] * Hinv[i, k]
                for lane in range(LANES):
                    W[k, lane] -= change[lane]


def gptq_rows(rows: np.ndarray, bits: int, block: int, symmetric: bool, scale_bits: int, Hinv: np.ndarray) -> Quantized:
    """Quantize rows of a weight as `round_rows` does, with Hinv from `inverse_cholesky`."""
    count, inputs = rows.shape
    block = block or inputs
    shape = (count, inputs // block)
    q, scales, zero_points = np.empty((count, inputs), np.int8), np.empty(shape, F), np.empty(shape, F)
    low, high = q_range(bits)
    steps, shares = search_steps(bits, symmetric, uniform=bool(np.ptp(np.diag(Hinv)) == 0))
    rows = np.ascontiguousarray(rows, F)
    _gptq(rows, block, low, high, symmetric, scale_bits == 16, Hinv, steps, shares, q, scales, zero_points)
    return Quantized(q, scales, None if symmetric else zero_points)


class Gptq(Calibrated):
    """GPTQ as a method of `hf2mnn.quant.methods`."""

    method = "gptq"

    def __init__(self, activations: Activations | None) -> None:
        super().__init__(activations)
        self._last: tuple[str, np.ndarray] | None = None

    def prepare(self, operator: Operator, form: WeightFormat) -> RoundRows:
        """Return the function that quantizes rows of an operator."""
        Hinv = self._inverse_cholesky(operator.name)
        return lambda _, rows: gptq_rows(rows, form.bits, form.block, form.symmetric, form.scale_bits, Hinv)

    def _inverse_cholesky(self, module: str) -> np.ndarray:
        """Return Hinv of a layer; the last one is kept, because layers with the same input follow each other."""
        tensor = self.activations.tensor(module)
        if self._last is None or self._last[0] != tensor:
            self._last = None
            self._last = (tensor, inverse_cholesky(self.activations.second_moment(module), module))
        return self._last[1]
