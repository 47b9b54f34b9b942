"""Tap points: named intermediate tensors at which PyTorch, ONNX Runtime and MNN are compared.

Each module with a weight and each block is a tap point by its output. Each attention has three more: `.query` and
`.key` after RoPE, and `.context` before the output projection. In every runtime a tap point has the name of its module
in the transformers model: `hf2mnn.onnx.tap_points` gives these names to values of the ONNX graphs, and MNN's converter
keeps them.
"""

from __future__ import annotations

import numpy as np

MAX_ROWS = 32
"""Rows (tokens or patches) stored of each tap point; few enough for models of any size."""


def evenly_spaced(count: int, most: int = MAX_ROWS) -> np.ndarray:
    """Return at most `most` evenly spaced indices of `count` rows, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def as_matrix(value: np.ndarray) -> np.ndarray:
    """Reshape the value of a tap point, [1, rows, ...] or [rows, ...], to [rows, values]."""
    value = value[0] if value.ndim > 2 and value.shape[0] == 1 else value
    return value.reshape(len(value), -1)
