"""AWQ (Lin et al., 2024): the scales of channels by which rounding harms the outputs least.

Scales are the mean sizes of a layer's inputs to a power between 0 and 1; the power is searched, for all layers that
read the same inputs together, by the error of their outputs: for a weight's error D and the inputs' second moment H,
the sum over rows of D H D^T.
"""

from __future__ import annotations

import numpy as np

from hf2mnn.families.base import Fold
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.quant.folding import Scales
from hf2mnn.quant.layer_inputs import Activations
from hf2mnn.quant.rounding import round_rows
from hf2mnn.quant.weights import Operator, WeightFile
from hf2mnn.reference.tap_points import kept_rows

POWERS = np.linspace(0, 1, 21)
ROWS = 256
"""Rows of a weight by which a power is judged."""
SMALLEST = 1e-4
"""Of the largest mean size: channels that are never used get no larger scale than this allows."""


def _candidates(sizes: np.ndarray) -> list[np.ndarray]:
    """Scales float32 [channels] for each power, around 1."""
    sizes = np.maximum(sizes, SMALLEST * sizes.max(initial=0)).astype(np.float64)
    if not sizes.any():
        return []
    found = [sizes**power for power in POWERS[1:]]
    return [(scales / np.sqrt(scales.max() * scales.min())).astype(np.float32) for scales in found]


def _harm(rows: np.ndarray, moment: np.ndarray, form: WeightFormat, columns: np.ndarray | None) -> float:
    """Error of the outputs where `rows` are rounded after scaling."""
    scaled = rows if columns is None else rows * columns
    importance = np.diag(moment) if columns is None else np.diag(moment) / np.square(columns)
    levels = round_rows(scaled, form.bits, form.block, form.symmetric, form.scale_bits, "mse", importance)
    made = levels.dequantize() if columns is None else levels.dequantize() / columns
    error = (made - rows).astype(np.float64)
    return float(np.einsum("ri,ri->", error @ moment, error))


def fold_scales(
    fold: Fold, readers: list[tuple[Operator, np.ndarray, WeightFormat]], activations: Activations
) -> np.ndarray | None:
    """Scales float32 [channels that the producer gives], None where none is better than leaving all as it is.

    `readers`: each operator that reads the fold with some of its rows, float32 [rows, inputs], and its format.
    """
    name = readers[0][0].name
    sizes = fold.gather(np.abs(activations.rows(name)).mean(axis=0))
    moment = activations.second_moment(name).astype(np.float64)

    def harm(columns: np.ndarray | None) -> float:
        return sum(_harm(rows, moment, form, columns) for _, rows, form in readers)

    best, least = None, harm(None)
    for scales in _candidates(sizes):
        found = harm(fold.spread(scales))
        if found < least:
            best, least = scales, found
    return best


def sample_rows(weights: WeightFile, operator: Operator) -> np.ndarray:
    """At most ROWS rows of a weight, evenly spread."""
    return weights.rows(operator)[kept_rows(operator.outputs, ROWS)]


def search_scales(
    folds: list[Fold],
    layers: list[Operator],
    weights: WeightFile,
    formats: dict[str, WeightFormat],
    activations: Activations | None,
) -> Scales:
    """Scales for every fold of which a reader is to be quantized by awq; those are in the same part as their producer.

    Raises:
        QuantizationError: nothing was recorded of a layer's inputs.
    """
    known, scales = {operator.name: operator for operator in layers}, Scales()
    for fold in folds:
        readers = [known[name] for name in fold.readers if name in known]
        if not readers or not all(_wanted(formats[operator.name]) for operator in readers):
            continue
        sampled = [(operator, sample_rows(weights, operator), formats[operator.name]) for operator in readers]
        found = fold_scales(fold, sampled, activations)
        if found is not None:
            scales.add(fold, found)
    return scales


def _wanted(form: WeightFormat) -> bool:
    return form.method == "awq" and form.bits < 16
