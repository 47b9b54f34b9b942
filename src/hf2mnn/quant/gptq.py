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
from hf2mnn.quant.layer_inputs import Calibrated, check_finite
from hf2mnn.quant.rounding import LANES, ONE, ZERO, F, RoundRows, run_kernel, search_scales
from hf2mnn.quant.weights import Operator

DAMPING = 0.01
"""Share of H's mean diagonal that is added to its diagonal: few inputs say little about rare directions."""


def inverse_cholesky(H: np.ndarray, name: str) -> np.ndarray:
    """Return Hinv of H with damping, both float32 [inputs, inputs]; `name` is the operator's, for error messages."""
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
    costs = ONE / np.square(np.diag(Hinv))
    for start in range(0, count, LANES):
        for lane in range(LANES):
            W[:, lane] = rows[min(start + lane, count - 1)]
        for index in range(inputs // block):
            begin, end = index * block, (index + 1) * block
            w_min[:], w_max[:] = W[begin], W[begin]
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
                change[:] = ZERO
                for i in range(begin, end):
                    for lane in range(LANES):
                        change[lane] += errors[i - begin, lane] * Hinv[i, k]
                W[k] -= change


def gptq_rows(rows: np.ndarray, form: WeightFormat, Hinv: np.ndarray) -> Quantized:
    """Quantize rows of a weight as `round_rows` does, with Hinv from `inverse_cholesky`."""
    return run_kernel(_gptq, rows, form, np.diag(Hinv), Hinv)


class Gptq(Calibrated):
    """GPTQ; the last Hinv is kept, because layers with the same input follow each other."""

    _last: tuple[str, np.ndarray] | None = None

    def prepare(self, operator: Operator, form: WeightFormat) -> RoundRows:
        """Return the function that quantizes rows of an operator."""
        tensor = self.activations.tensor(operator.name)
        if self._last is None or self._last[0] != tensor:
            self._last = None  # frees its memory
            self._last = tensor, inverse_cholesky(self.activations.second_moment(operator.name), operator.name)
        Hinv = self._last[1]
        return lambda _, rows: gptq_rows(rows, form, Hinv)
