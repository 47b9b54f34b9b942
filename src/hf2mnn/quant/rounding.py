"""Levels and scales for the weights of a linear layer: where they are rounded to, whatever the inputs will be.

    rtn   the range of a block in equal steps: round to nearest
    hqq   half-quadratic quantization (Badri & Shaji, 2023): the zero point that makes the p-norm of the error small,
          p = 0.7, the scale left as it is; 20 steps, as MNN's converter does them
    mse   least squares: the scale and zero point with the smallest weighted sum of squared errors that a search finds

All work on tiles of LANES rows by one block, rows along the SIMD lanes: every sum runs over a block in its order, so
results depend neither on threads nor on the width of the machine's registers. Scales and zero points are rounded to the
float type that they are stored in *before* levels and errors are computed with them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hf2mnn.quant.blob import Levels

LANES = 32
F = np.float32
ZERO, ONE = F(0), F(1)
HALF_NORMAL = F(2.0**-14)
"""Smallest normal half float; below it they are multiples of 2^-24."""
METHODS = {"rtn": 0, "hqq": 1, "mse": 2}

STEPS, P, BETA = 20, F(0.7), F(10)
SHRINKS = F(BETA ** (-1 / (2 - P)))
"""Errors below this become 0 in the shrinkage of hqq: |x| <= |x|^(p-1) / beta."""

RANGE, LOW, HIGH, AGAIN, BEST = range(5)
"""Steps of the search of mse. RANGE: the block's range, with a share of it cut off at each end; LOW, HIGH: the best
scale, changed by a share of itself, while the lowest (highest) level stays where it is; AGAIN, BEST: what least squares
makes of the levels of the step before, or of the best."""
NUDGES = (-1.0, 1.0, -0.5, 0.5)
"""Changes of a scale, in halves of a step over its 2^bits levels."""


def narrowest(bits: int) -> float:
    """How much of a block's range may be cut off at each end: with few levels, clipping a tail is worth it."""
    return {2: 0.4, 3: 0.3, 4: 0.3, 5: 0.2, 6: 0.1, 7: 0.06, 8: 0.04}[bits]


@njit(nogil=True, cache=True, inline="always")
def stored(x, half):
    """The value that is stored of a float32: itself, or the nearest half float (Veltkamp's splitting)."""
    if not half:
        return x
    if abs(x) < HALF_NORMAL:
        return (x + F(0.75)) - F(0.75)
    large = x * F(8193)
    return large - (large - x)


@njit(nogil=True, cache=True, inline="always")
def _fit(tile, importance, scale, zero, low, high, sums):
    """With these scales: sums[0] the weighted squared error, and of the levels chosen, weighted: [1] their sum, [2] of
    their squares, [3] of their products with the weights.
    """
    inverse = np.empty(LANES, F)
    for lane in range(LANES):
        inverse[lane] = ONE / scale[lane] if scale[lane] > ZERO else ZERO
        for which in range(4):
            sums[which, lane] = ZERO
    for i in range(tile.shape[0]):
        h = importance[i]
        for lane in range(LANES):
            weight = tile[i, lane]
            level = min(max(np.rint((weight - zero[lane]) * inverse[lane]), low), high)
            error = weight - (level * scale[lane] + zero[lane])
            sums[0, lane] += h * error * error
            sums[1, lane] += h * level
            sums[2, lane] += h * level * level
            sums[3, lane] += h * weight * level


@njit(nogil=True, cache=True, inline="always")
def _refit(sums, total, weighted, symmetric, half, scale, zero):
    """Scale and zero by linear regression of the weights on the levels that `_fit` has chosen; left as they are where
    there is none. `total` is the sum of the importance, `weighted` that of the weights times it.
    """
    for lane in range(LANES):
        if symmetric:
            if sums[2, lane] > ZERO:
                scale[lane] = stored(abs(sums[3, lane]) / sums[2, lane], half)
        else:
            spread = total * sums[2, lane] - sums[1, lane] * sums[1, lane]
            if spread > ZERO and total > ZERO:
                slope = (total * sums[3, lane] - sums[1, lane] * weighted[lane]) / spread
                if slope > ZERO:
                    scale[lane] = stored(slope, half)
                    zero[lane] = stored((weighted[lane] - slope * sums[1, lane]) / total, half)


@njit(nogil=True, cache=True)
def least_squares(tile, importance, least, most, low, high, symmetric, half, kinds, shares, best, scales, zeros):
    """Scales and zeros with the smallest error of those that the steps, `kinds` with their `shares`, try.
    `best` [4, LANES] is scratch: what `_fit` says of the best.
    """
    middle = F(0.5) * (low + high)
    scale, zero, sums = np.empty(LANES, F), np.empty(LANES, F), np.empty((4, LANES), F)
    total, weighted = ZERO, np.zeros(LANES, F)
    for i in range(tile.shape[0]):
        total += importance[i]
        for lane in range(LANES):
            weighted[lane] += importance[i] * tile[i, lane]
    for step in range(len(kinds)):
        kind, share = kinds[step], shares[step]
        if kind == RANGE:
            for lane in range(LANES):
                if symmetric:
                    reach = max(-least[lane], most[lane])
                    scale[lane], zero[lane] = stored(reach * (ONE - F(2) * share) / high, half), ZERO
                else:
                    width = (most[lane] - least[lane]) * (ONE - F(2) * share)
                    scale[lane] = stored(width / (high - low), half)
                    zero[lane] = stored(F(0.5) * (least[lane] + most[lane]) - middle * scale[lane], half)
        elif kind in (LOW, HIGH):
            end = low if kind == LOW else high
            for lane in range(LANES):
                scale[lane] = stored(scales[lane] * (ONE + share), half)
                zero[lane] = ZERO if symmetric else stored(zeros[lane] + (scales[lane] - scale[lane]) * end, half)
        elif kind == AGAIN:
            _refit(sums, total, weighted, symmetric, half, scale, zero)
        else:
            for lane in range(LANES):
                scale[lane], zero[lane] = scales[lane], zeros[lane]
            _refit(best, total, weighted, symmetric, half, scale, zero)
        _fit(tile, importance, scale, zero, low, high, sums)
        # Without a branch, so that lanes are still worked on side by side.
        for lane in range(LANES):
            better = step == 0 or sums[0, lane] < best[0, lane]
            scales[lane] = scale[lane] if better else scales[lane]
            zeros[lane] = zero[lane] if better else zeros[lane]
            for which in range(4):
                best[3 - which, lane] = sums[3 - which, lane] if better else best[3 - which, lane]


@njit(nogil=True, cache=True)
def _half_quadratic(tile, least, most, low, high, half, scales, zeros):
    """The scale of the range, and the zero point after STEPS steps; zero is in steps of the scale, counted from 0."""
    size = F(tile.shape[0])
    inverse, zero, sums = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    top = high - low
    for lane in range(LANES):
        inverse[lane] = ONE / max((most[lane] - least[lane]) / top, F(1e-7))
        zero[lane] = -least[lane] * inverse[lane]
    for _ in range(STEPS):
        large = ZERO
        for lane in range(LANES):
            sums[lane] = ZERO
            # No error is larger than half a step, or than what the ends of the range stand over.
            over = max(-(least[lane] * inverse[lane] + zero[lane]), most[lane] * inverse[lane] + zero[lane] - top)
            large = max(large, max(over, F(0.5)) / inverse[lane])
        if large <= SHRINKS:
            for i in range(tile.shape[0]):
                for lane in range(LANES):
                    scaled = tile[i, lane] * inverse[lane]
                    sums[lane] += min(max(np.rint(scaled + zero[lane]), ZERO), top) - scaled
        else:
            for i in range(tile.shape[0]):
                for lane in range(LANES):
                    scaled = tile[i, lane] * inverse[lane]
                    level = min(max(np.rint(scaled + zero[lane]), ZERO), top)
                    error = tile[i, lane] - (level - zero[lane]) / inverse[lane]
                    size_of = abs(error)
                    kept = ZERO
                    if size_of > SHRINKS:
                        kept = max(size_of - size_of ** (P - ONE) / BETA, ZERO)
                        kept = kept if error > ZERO else -kept
                    sums[lane] += level - (tile[i, lane] - kept) * inverse[lane]
        for lane in range(LANES):
            zero[lane] = sums[lane] / size
    for lane in range(LANES):
        scales[lane] = stored(ONE / inverse[lane], half)
        zeros[lane] = stored(-(zero[lane] + low) / inverse[lane], half)


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _extremes(values):
    """Smallest and largest of finite numbers; in whichever order they are compared."""
    least = most = values[0]
    for value in values:
        least, most = min(least, value), max(most, value)
    return least, most


@njit(nogil=True, cache=True)
def _choose(values, scale, zero, low, high, levels):
    inverse = ONE / scale if scale > ZERO else ZERO
    # From 0, on views: indices that may be negative are not vectorized.
    for i in range(len(values)):
        levels[i] = np.int8(min(max(np.rint((values[i] - zero) * inverse), low), high))


@njit(nogil=True, cache=True)
def _round(rows, block, low, high, symmetric, half, method, importance, kinds, shares, levels, scales, zeros):
    """Fill levels [rows, inputs], scales and zeros [rows, blocks]."""
    count, inputs = rows.shape
    tile, best = np.empty((block, LANES), F), np.empty((4, LANES), F)
    least, most = np.empty(LANES, F), np.empty(LANES, F)
    scale, zero = np.empty(LANES, F), np.empty(LANES, F)
    for start in range(0, count, LANES):
        for place in range(inputs // block):
            begin, end = place * block, (place + 1) * block
            for lane in range(LANES):
                values = rows[min(start + lane, count - 1), begin:end]
                least[lane], most[lane] = _extremes(values)
                if method != 0:
                    for i in range(block):
                        tile[i, lane] = values[i]
            if method == 0:
                # As the converter does it: levels by the exact scale, whose nearest half float is stored.
                for lane in range(LANES):
                    if symmetric:
                        scale[lane], zero[lane] = max(-least[lane], most[lane]) / high, ZERO
                    else:
                        scale[lane] = (most[lane] - least[lane]) / (high - low)
                        zero[lane] = least[lane] - low * scale[lane]
            elif method == 1:
                _half_quadratic(tile, least, most, low, high, half, scale, zero)
            else:
                h = importance[begin:end]
                least_squares(tile, h, least, most, low, high, symmetric, half, kinds, shares, best, scale, zero)
            for lane in range(min(LANES, count - start)):
                row = start + lane
                _choose(rows[row, begin:end], scale[lane], zero[lane], low, high, levels[row, begin:end])
                scales[row, place] = stored(scale[lane], half)
                zeros[row, place] = stored(zero[lane], half)


def level_range(bits: int) -> tuple[np.float32, np.float32]:
    """Lowest and highest level."""
    return F(-(1 << bits - 1)), F((1 << bits - 1) - 1)


def search_steps(bits: int, symmetric: bool, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """Kinds, int64 [steps], and shares, float32 [steps], of the search of mse.

    The whole search refits each range and each change of the best one twice. Where all weights count the same (`even`)
    a third of the steps comes within a hundredth of its error; where few count most, it does not. With 8 bits the error
    is so small that less will do.
    """
    nudges = [nudge / (2 << bits) for nudge in NUDGES]
    ends = [LOW] if symmetric else [LOW, HIGH]
    if not even:
        ranges = [(RANGE, cut) for cut in np.linspace(0, narrowest(bits), 8)]
        tried = [*ranges, *((end, nudge) for end in ends for nudge in nudges)]
        steps = [step for one in tried for step in (one, (AGAIN, 0), (AGAIN, 0))]
    else:
        count, nudges, refits = (2, nudges[:2], 1) if bits == 8 else (4, nudges, 2)
        ranges = [(RANGE, cut) for cut in np.linspace(0, narrowest(bits), count)]
        moves = [(end, nudge) for end in ends for nudge in nudges]
        steps = [*ranges, (BEST, 0), *moves, *[(BEST, 0)] * refits]
    kinds, shares = zip(*steps, strict=True)
    return np.array(kinds), np.array(shares, F)


def round_rows(
    rows: np.ndarray,
    bits: int,
    block: int,
    symmetric: bool,
    scale_bits: int,
    method: str,
    importance: np.ndarray | None = None,
) -> Levels:
    """Quantize rows of a weight, float32 [rows, inputs], each by itself.

    `block` divides the inputs, 0 is one block a row. `importance` float32 [inputs], not negative, weighs the squared
    errors of mse. hqq has no symmetric form.
    """
    count, inputs = rows.shape
    block = block or inputs
    blocks = inputs // block
    levels, scales = np.empty((count, inputs), np.int8), np.empty((count, blocks), F)
    zeros = np.empty((count, blocks), F)
    weights = np.ones(inputs, F) if importance is None else np.ascontiguousarray(importance, F)
    low, high = level_range(bits)
    kinds, shares = search_steps(bits, symmetric, even=bool(np.ptp(weights) == 0))
    rows, half, code = np.ascontiguousarray(rows, F), scale_bits == 16, METHODS[method]
    _round(rows, block, low, high, symmetric, half, code, weights, kinds, shares, levels, scales, zeros)
    return Levels(levels, scales, None if symmetric else zeros)
