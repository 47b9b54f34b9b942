"""Points at which PyTorch, ONNX and MNN are compared: what each module with a weight and each block gives, and of each
attention its `.query` and `.key` after rotation and its `.context` before the output projection.

A point has the name of its module in the transformers model, in every runtime: `hf2mnn.onnx.tap_points` names the values
of the graphs so, and MNN's converter keeps them.
"""

from __future__ import annotations

import numpy as np

ROWS = 32
"""Rows (tokens or patches) that are kept of each point: enough to see a fault, small for any model."""


def kept_rows(count: int, most: int = ROWS) -> np.ndarray:
    """Indices of at most `most` of `count` rows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def as_rows(value: np.ndarray) -> np.ndarray:
    """[rows, values] of a point's value, whose axes are [1, rows, ...] or [rows, ...]."""
    value = value[0] if value.ndim > 2 and value.shape[0] == 1 else value
    return value.reshape(len(value), -1)
