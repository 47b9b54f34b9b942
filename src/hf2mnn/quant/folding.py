"""Channel scales folded into the weights of adjacent layers (AWQ, Lin et al., 2024).

The outputs of a layer are divided by the scales, the inputs of the next layers multiplied: the model computes the same
function. Channels whose inputs are large get larger weights, which lose less by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from hf2mnn.families.base import Fold
from hf2mnn.mnn.graph import Op
from hf2mnn.quant.weights import Operator, WeightFile

FOLDED = "folded.safetensors"
"""File of a bundle with `Scales.tap_points`, for the comparison layer by layer."""


@dataclass
class Scales:
    """Scales of folds, float32 vectors by module."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)  # factors of the columns of a balance layer
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # divisors of rows of a smooth layer, or gamma and beta

    def add(self, fold: Fold, scales: np.ndarray) -> None:
        """Add the scales of a fold, float32 [output channels of `fold.smooth_layer`]."""
        self.rows[fold.smooth_layer] = scales
        for layer in fold.balance_layers:
            self.columns[layer] = fold.expand(scales)

    def tap_points(self, folds: list[Fold]) -> dict[str, np.ndarray]:
        """Return the factors by which values of scaled tap points become those of the checkpoint."""
        factors = {}
        for fold in folds:
            if (scales := self.rows.get(fold.smooth_layer)) is not None:
                factors |= {fold.smooth_layer: scales, **dict.fromkeys(fold.tap_points, fold.expand(scales))}
        return factors


def folded_tap_points(bundle: Path) -> dict[str, np.ndarray]:
    """Return `Scales.tap_points` of a bundle, float32 vectors by tap point; empty if it has no folded scales."""
    path = bundle / FOLDED
    return load_file(path) if path.is_file() else {}


class FoldedWeights(WeightFile):
    """A float weight file with scales folded into its weights."""

    def __init__(self, weights: WeightFile, scales: Scales) -> None:
        self.path, self.weights, self.scales = weights.path, weights, scales

    def rows(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return scaled rows as `WeightFile.rows` does."""
        rows = self.weights.rows(operator, begin, end)
        if operator.name in self.scales.columns:
            rows = rows * self.scales.columns[operator.name]
        if operator.name in self.scales.rows:
            rows = rows / self.scales.rows[operator.name][begin:end, None]
        return rows

    def bias(self, operator: Operator) -> bytes:
        """Return the scaled bias."""
        return self._divide(self.weights.bias(operator), operator.name)

    def constants(self, op: Op) -> bytes:
        """Return scaled gamma and beta of a normalization."""
        return self._divide(self.weights.constants(op), op["name"])

    def _divide(self, values: bytes, name: str) -> bytes:
        """Divide one or more vectors, one after the other."""
        if name not in self.scales.rows:
            return values
        scales = self.scales.rows[name]
        return (np.frombuffer(values, np.float32).reshape(-1, len(scales)) / scales).tobytes()
