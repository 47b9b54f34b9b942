"""AWQ (Lin et al., 2024): search of the channel scales, folded into adjacent layers, with the least error of outputs.

A scale is the mean magnitude of a channel of a layer's inputs to a power between 0 and 1. The power is searched for all
layers with the same input together. The measure is the error of their outputs: for the error D of a weight and
H = E[x x^T], the sum over rows of D H D^T.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf2mnn.families.base import Fold
from hf2mnn.quant.folding import Scales
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.layer_inputs import Activations, Calibrated, check_finite
from hf2mnn.quant.rounding import RoundRows, round_rows
from hf2mnn.quant.weights import Operator, WeightFile
from hf2mnn.reference.golden import evenly_spaced

POWERS = np.linspace(0, 1, 21)
SAMPLED_ROWS = 256
"""Rows of a weight by which a power is judged."""
SMALLEST = 1e-4
"""Smallest magnitude of a channel, as a share of the largest one: unused channels get no smaller scale."""


def _output_error(W: np.ndarray, H: np.ndarray, form: WeightFormat, s: np.ndarray) -> float:
    """Return the error of the outputs of rows W that are quantized after scaling by s."""
    quantized = round_rows(W * s, replace(form, method="mse"), np.diag(H) / np.square(s))
    D = (quantized.dequantize() / s - W).astype(np.float64)
    return float(np.einsum("ri,ri->", D @ H, D))


def search_fold(
    fold: Fold, layers: list[tuple[Operator, np.ndarray, WeightFormat]], activations: Activations
) -> np.ndarray | None:
    """Search the scales of a fold, float32 [output channels of `fold.smooth_layer`]; None if no scaling is best.

    Each balance layer comes with some rows of its weight, float32 [rows, inputs], and its format.
    """
    name = layers[0][0].name
    magnitudes = fold.reduce(np.abs(activations.rows(name)).mean(axis=0))
    magnitudes = np.maximum(magnitudes, SMALLEST * magnitudes.max(initial=0)).astype(np.float64)
    H = activations.second_moment(name).astype(np.float64)
    if not magnitudes.any():
        return None
    powers = [magnitudes**power for power in POWERS]
    # The geometric mean of a candidate's extremes is 1; the first one, of power 0, does not scale.
    candidates = [(scales / np.sqrt(scales.max() * scales.min())).astype(np.float32) for scales in powers]
    best = min(candidates, key=lambda s: sum(_output_error(W, H, form, fold.expand(s)) for _, W, form in layers))
    return None if best is candidates[0] else best


class Awq(Calibrated):
    """AWQ; `scales` are those of the part that is being quantized."""

    def __init__(self, activations: Activations | None) -> None:
        super().__init__(activations)
        self.scales = Scales()

    def search(
        self, folds: list[Fold], layers: list[Operator], weights: WeightFile, formats: dict[str, WeightFormat]
    ) -> Scales:
        """Set `scales` for every fold whose balance layers in `layers` are all quantized by awq, and return them."""
        by_name, self.scales = {operator.name: operator for operator in layers}, Scales()
        for fold in folds:
            balance = [by_name[name] for name in fold.balance_layers if name in by_name]
            forms = [formats[operator.name] for operator in balance]
            if not balance or not all(form.method == "awq" and form.bits < 16 for form in forms):
                continue
            rows = [weights.rows(layer)[evenly_spaced(layer.outputs, SAMPLED_ROWS)] for layer in balance]
            scales = search_fold(fold, list(zip(balance, rows, forms, strict=True)), self.activations)
            if scales is not None:
                self.scales.add(fold, scales)
        return self.scales

    def prepare(self, operator: Operator, form: WeightFormat) -> RoundRows:
        """Return the function that quantizes rows of an operator: mse, weighted by the mean squares of the inputs."""
        mean_squares = np.square(self.activations.rows(operator.name), dtype=np.float64).mean(axis=0)
        check_finite(mean_squares, operator.name)
        s = self.scales.columns.get(operator.name, np.ones(operator.inputs, np.float32))
        importance = (mean_squares / np.square(s, dtype=np.float64)).astype(np.float32)
        return lambda _, rows: round_rows(rows, replace(form, method="mse"), importance)
