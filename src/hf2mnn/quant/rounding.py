"""Methods without calibration data, which differ in the scales and zero points of a block.

    rtn   round to nearest: equal steps over the range of the block
    hqq   half-quadratic quantization (Badri & Shaji, 2023): the scale of rtn, and the zero point with the smallest
          p-norm of the error, p = 0.7; 20 iterations, as in MNN's converter
    mse   scale search by mean squared error: the scale and zero point with the smallest weighted sum of squared errors

Weights W are processed in tiles of one block by LANES rows, with the rows along the SIMD lanes. Sums over a block have
a fixed order, so results depend neither on threads nor on the width of registers. Scales and zero points are rounded to
their stored float type before errors are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from hf2mnn.quant.blob import Quantized
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.weights import Operator

RoundRows = Callable[[int, np.ndarray], Quantized]
"""Quantize rows of a weight, given the index of the first row and float32 [rows, inputs]; any thread may call it."""

LANES = 32
F = np.float32
ZERO, ONE = F(0), F(1)
FLOAT16_TINY = F(2.0**-14)
"""Smallest normal float16; smaller values are multiples of 2^-24."""
DATA_FREE = {"rtn": 0, "hqq": 1, "mse": 2}
"""Methods of this module, and their codes in the kernel."""

ITERATIONS, P, BETA = 20, F(0.7), F(10)
SHRINK_LIMIT = F(BETA ** (-1 / (2 - P)))
"""Errors below this are 0 after the shrinkage of hqq: |x| <= |x|^(p-1) / beta."""

RANGE, KEEP_LOW, KEEP_HIGH, REFIT, REFIT_BEST = range(5)
"""Steps of the search of mse.

RANGE: the range of the block, with a share of it cut off at each end. KEEP_LOW, KEEP_HIGH: the best scale, changed by a
share of itself, with the weight at the lowest (highest) q unchanged. REFIT, REFIT_BEST: least squares for the q of the
previous step, or of the best one.
"""
NUDGES = (-1.0, 1.0, -0.5, 0.5)
"""Changes of a scale, in halves of a step over its 2^bits values."""
LARGEST_CUT = {2: 0.4, 3: 0.3, 4: 0.3, 5: 0.2, 6: 0.1, 7: 0.06, 8: 0.04}
"""Largest share of a block's range to cut off at each end, by bits: with few values of q, clipping is worth it."""


@njit(nogil=True, cache=True, inline="always")
def stored(x, half):
    """Round a float32 to its stored type: itself, or the nearest float16 (Veltkamp's splitting)."""
    if not half:
        return x
    if abs(x) < FLOAT16_TINY:
        return (x + F(0.75)) - F(0.75)
    large = x * F(8193)
    return large - (large - x)


@njit(nogil=True, cache=True, inline="always")
def _errors(W, h, s, z, low, high, sums):
    """Set `sums` of a tile quantized with s and z: squared errors, q, q^2 and w * q, all weighted by h."""
    inverse = np.empty(LANES, F)
    sums[:] = ZERO
    for lane in range(LANES):
        inverse[lane] = ONE / s[lane] if s[lane] > ZERO else ZERO
    for i in range(W.shape[0]):
        weight = h[i]
        for lane in range(LANES):
            w = W[i, lane]
            q = min(max(np.rint((w - z[lane]) * inverse[lane]), low), high)
            error = w - (q * s[lane] + z[lane])
            sums[0, lane] += weight * error * error
            sums[1, lane] += weight * q
            sums[2, lane] += weight * q * q
            sums[3, lane] += weight * w * q


@njit(nogil=True, cache=True, inline="always")
def _refit(sums, total, weighted, symmetric, half, s, z):
    """Set s and z by regression of w on q, if it has a solution; `total` is the sum of h, `weighted` that of h * w."""
    for lane in range(LANES):
        if symmetric:
            if sums[2, lane] > ZERO:
                s[lane] = stored(abs(sums[3, lane]) / sums[2, lane], half)
        else:
            spread = total * sums[2, lane] - sums[1, lane] * sums[1, lane]
            if spread > ZERO and total > ZERO:
                slope = (total * sums[3, lane] - sums[1, lane] * weighted[lane]) / spread
                if slope > ZERO:
                    s[lane] = stored(slope, half)
                    z[lane] = stored((weighted[lane] - slope * sums[1, lane]) / total, half)


@njit(nogil=True, cache=True)
def search_scales(W, h, w_min, w_max, low, high, symmetric, half, steps, shares, best, scales, zero_points):
    """Search the scales and zero points of a tile (mse) by `search_steps`; `best` has the sums of the best step."""
    middle = F(0.5) * (low + high)
    s, z, sums = np.empty(LANES, F), np.empty(LANES, F), np.empty((4, LANES), F)
    total, weighted = ZERO, np.zeros(LANES, F)
    for i in range(W.shape[0]):
        total += h[i]
        for lane in range(LANES):
            weighted[lane] += h[i] * W[i, lane]
    for index in range(len(steps)):
        step, share = steps[index], shares[index]
        if step == RANGE:
            for lane in range(LANES):
                if symmetric:
                    reach = max(-w_min[lane], w_max[lane])
                    s[lane], z[lane] = stored(reach * (ONE - F(2) * share) / high, half), ZERO
                else:
                    width = (w_max[lane] - w_min[lane]) * (ONE - F(2) * share)
                    s[lane] = stored(width / (high - low), half)
                    z[lane] = stored(F(0.5) * (w_min[lane] + w_max[lane]) - middle * s[lane], half)
        elif step in (KEEP_LOW, KEEP_HIGH):
            end = low if step == KEEP_LOW else high
            for lane in range(LANES):
                s[lane] = stored(scales[lane] * (ONE + share), half)
                z[lane] = ZERO if symmetric else stored(zero_points[lane] + (scales[lane] - s[lane]) * end, half)
        elif step == REFIT:
            _refit(sums, total, weighted, symmetric, half, s, z)
        else:
            s[:], z[:] = scales, zero_points
            _refit(best, total, weighted, symmetric, half, s, z)
        _errors(W, h, s, z, low, high, sums)
        # Selected without a branch, so that the loop is vectorized.
        for lane in range(LANES):
            better = index == 0 or sums[0, lane] < best[0, lane]
            scales[lane] = s[lane] if better else scales[lane]
            zero_points[lane] = z[lane] if better else zero_points[lane]
            for k in range(4):
                best[3 - k, lane] = sums[3 - k, lane] if better else best[3 - k, lane]


@njit(nogil=True, cache=True)
def _half_quadratic(W, w_min, w_max, low, high, half, scales, zero_points):
    """Set the scales and zero points of a tile by hqq; its zero point `zero` is in steps of the scale, from q = 0."""
    size = F(W.shape[0])
    inverse, zero, sums = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    top = high - low
    for lane in range(LANES):
        inverse[lane] = ONE / max((w_max[lane] - w_min[lane]) / top, F(1e-7))
        zero[lane] = -w_min[lane] * inverse[lane]
    for _ in range(ITERATIONS):
        largest = ZERO
        for lane in range(LANES):
            sums[lane] = ZERO
            # An error is at most half a step, or the distance of an end of the range from the nearest q.
            over = max(-(w_min[lane] * inverse[lane] + zero[lane]), w_max[lane] * inverse[lane] + zero[lane] - top)
            largest = max(largest, max(over, F(0.5)) / inverse[lane])
        if largest <= SHRINK_LIMIT:
            for i in range(W.shape[0]):
                for lane in range(LANES):
                    scaled = W[i, lane] * inverse[lane]
                    sums[lane] += min(max(np.rint(scaled + zero[lane]), ZERO), top) - scaled
        else:
            for i in range(W.shape[0]):
                for lane in range(LANES):
                    scaled = W[i, lane] * inverse[lane]
                    q = min(max(np.rint(scaled + zero[lane]), ZERO), top)
                    error = W[i, lane] - (q - zero[lane]) / inverse[lane]
                    magnitude = abs(error)
                    shrunk = ZERO
                    if magnitude > SHRINK_LIMIT:
                        shrunk = max(magnitude - magnitude ** (P - ONE) / BETA, ZERO)
                        shrunk = shrunk if error > ZERO else -shrunk
                    sums[lane] += q - (W[i, lane] - shrunk) * inverse[lane]
        for lane in range(LANES):
            zero[lane] = sums[lane] / size
    for lane in range(LANES):
        scales[lane] = stored(ONE / inverse[lane], half)
        zero_points[lane] = stored(-(zero[lane] + low) / inverse[lane], half)


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _extremes(values):
    """Return the smallest and largest of finite numbers; the order of comparisons does not matter."""
    smallest = largest = values[0]
    for value in values:
        smallest, largest = min(smallest, value), max(largest, value)
    return smallest, largest


@njit(nogil=True, cache=True)
def _quantize(w, s, z, low, high, q):
    inverse = ONE / s if s > ZERO else ZERO
    # Views that start at 0: loops over indices that may be negative are not vectorized.
    for i in range(len(w)):
        q[i] = np.int8(min(max(np.rint((w[i] - z) * inverse), low), high))


@njit(nogil=True, cache=True)
def _round(rows, block, low, high, symmetric, half, method, importance, steps, shares, q, scales, zero_points):
    """Fill q [rows, inputs], scales and zero points [rows, blocks]."""
    count, inputs = rows.shape
    W, best = np.empty((block, LANES), F), np.empty((4, LANES), F)
    w_min, w_max = np.empty(LANES, F), np.empty(LANES, F)
    s, z = np.empty(LANES, F), np.empty(LANES, F)
    for start in range(0, count, LANES):
        for index in range(inputs // block):
            begin, end = index * block, (index + 1) * block
            for lane in range(LANES):
                w = rows[min(start + lane, count - 1), begin:end]
                w_min[lane], w_max[lane] = _extremes(w)
                if method != 0:
                    W[:, lane] = w
            if method == 0:
                # As in the converter: q is computed with the exact scale, and its nearest float16 is stored.
                for lane in range(LANES):
                    if symmetric:
                        s[lane], z[lane] = max(-w_min[lane], w_max[lane]) / high, ZERO
                    else:
                        s[lane] = (w_max[lane] - w_min[lane]) / (high - low)
                        z[lane] = w_min[lane] - low * s[lane]
            elif method == 1:
                _half_quadratic(W, w_min, w_max, low, high, half, s, z)
            else:
                h = importance[begin:end]
                search_scales(W, h, w_min, w_max, low, high, symmetric, half, steps, shares, best, s, z)
            for lane in range(min(LANES, count - start)):
                row = start + lane
                _quantize(rows[row, begin:end], s[lane], z[lane], low, high, q[row, begin:end])
                scales[row, index] = stored(s[lane], half)
                zero_points[row, index] = stored(z[lane], half)


def search_steps(bits: int, symmetric: bool, uniform: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the search of mse, int64 [steps], and their shares, float32 [steps].

    The full search refits each range and each change of the best scale twice. With uniform importance, a third of the
    steps comes within 1 % of its error; with 8 bits, errors are so small that fewer steps suffice.
    """
    cuts, nudges, refits = (2, NUDGES[:2], 1) if uniform and bits == 8 else (4 if uniform else 8, NUDGES, 2)
    ends = [KEEP_LOW] if symmetric else [KEEP_LOW, KEEP_HIGH]
    ranges = [(RANGE, cut) for cut in np.linspace(0, LARGEST_CUT[bits], cuts)]
    changes = [(end, nudge / (2 << bits)) for end in ends for nudge in nudges]
    if uniform:
        steps = [*ranges, (REFIT_BEST, 0), *changes, *[(REFIT_BEST, 0)] * refits]
    else:
        steps = [step for change in [*ranges, *changes] for step in (change, *[(REFIT, 0)] * refits)]
    codes, shares = zip(*steps, strict=True)
    return np.array(codes), np.array(shares, F)


def run_kernel(kernel: Callable, rows: np.ndarray, form: WeightFormat, h: np.ndarray, *inputs: Any) -> Quantized:
    """Quantize float32 [rows, inputs] by a kernel with `inputs` of its own; h [inputs] weights the errors of mse."""
    rows, block = np.ascontiguousarray(rows, F), form.block or rows.shape[1]
    q, half = np.empty(rows.shape, np.int8), form.scale_bits == 16
    scales, zero_points = np.empty((2, len(rows), rows.shape[1] // block), F)
    low, high = F(-(1 << form.bits - 1)), F((1 << form.bits - 1) - 1)
    steps, shares = search_steps(form.bits, form.symmetric, uniform=bool(np.ptp(h) == 0))
    kernel(rows, block, low, high, form.symmetric, half, *inputs, steps, shares, q, scales, zero_points)
    return Quantized(q, scales, None if form.symmetric else zero_points)


def round_rows(rows: np.ndarray, form: WeightFormat, importance: np.ndarray | None = None) -> Quantized:
    """Quantize rows of a weight, float32 [rows, inputs], independently of each other by rtn, hqq or mse.

    `importance`, float32 [inputs] and not negative, weights the squared errors of mse.
    """
    h = np.ones(rows.shape[1], F) if importance is None else np.ascontiguousarray(importance, F)
    return run_kernel(_round, rows, form, h, DATA_FREE[form.method], h)


class Method:
    """A method of quantization; this base class is that of rtn, hqq and mse, which need no data."""

    def resolve(self, operator: Operator, form: WeightFormat) -> WeightFormat:
        """Return the format in which an operator is stored. Raise QuantizationError if the method lacks an input."""
        return form

    def prepare(self, operator: Operator, form: WeightFormat) -> RoundRows:
        """Return the function that quantizes rows of an operator."""
        return lambda _, rows: round_rows(rows, form)
