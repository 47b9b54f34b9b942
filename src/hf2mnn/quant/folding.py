"""Scales of channels, folded into neighbouring weights: what one operator gives is divided, what reads it multiplied.

The model computes the same; only what rounding makes of its weights is different. A channel that the inputs make
important is given larger weights, which lose less by it (AWQ, Lin et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hf2mnn.families.base import Fold
from hf2mnn.quant.weights import Operator, WeightFile

FOLDED = "folded.safetensors"
"""In a bundle: `Scales.points`, for the comparison layer by layer."""


@dataclass
class Scales:
    """float32 vectors by module: `columns` multiply the inputs' weights, `rows` divide the outputs'."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, fold: Fold, scales: np.ndarray) -> None:
        """`scales` float32 [channels that the producer gives]."""
        self.rows[fold.producer] = scales
        for reader in fold.readers:
            self.columns[reader] = fold.spread(scales)

    def points(self, folds: list[Fold]) -> dict[str, np.ndarray]:
        """What the values of each point on the way must be multiplied with to be the checkpoint's."""
        found = {}
        for fold in folds:
            if fold.producer in self.rows:
                found[fold.producer] = self.rows[fold.producer]
                found |= {point: fold.spread(self.rows[fold.producer]) for point in fold.passes}
        return found


def folded_points(bundle: Path) -> dict[str, np.ndarray]:
    """float32 [values] by point (`hf2mnn.reference.tap_points`); nothing where the bundle has no folded scales."""
    path = bundle / FOLDED
    return load_file(path) if path.is_file() else {}


class FoldedWeights(WeightFile):
    """A float weight file, read as it is once scales are folded into it."""

    def __init__(self, weights: WeightFile, scales: Scales) -> None:
        self.path, self.weights, self.scales = weights.path, weights, scales

    def rows(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        end = operator.outputs if end is None else end
        found = self.weights.rows(operator, begin, end)
        if operator.name in self.scales.columns:
            found = found * self.scales.columns[operator.name]
        if operator.name in self.scales.rows:
            found = found / self.scales.rows[operator.name][begin:end, None]
        return found

    def bias(self, operator: Operator) -> bytes:
        return self._divided(self.weights.bias(operator), operator.name)

    def constants(self, op: dict[str, Any]) -> bytes:
        return self._divided(self.weights.constants(op), op["name"])

    def _divided(self, stored: bytes, name: str) -> bytes:
        """Biases, and gamma and beta one after the other."""
        if name not in self.scales.rows:
            return stored
        scales = self.scales.rows[name]
        return (np.frombuffer(stored, np.float32).reshape(-1, len(scales)) / scales).tobytes()
