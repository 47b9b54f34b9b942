"""Known patterns of wrong operators: only zeros, another layer's weights, a flipped sign of a rotation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from hf2mnn.metrics import relative_error
from hf2mnn.onnx.initializers import Matrices
from hf2mnn.onnx.tap_points import WEIGHT
from hf2mnn.reference.golden import as_matrix

Value = Callable[[str], np.ndarray]
"""Function from the name of a value to the value, computed by the ONNX graph from MNN's tap points."""
LINEAR_LAYER, ROTATION = "linear layer", "rotary position embedding"
"""Kinds of operators with patterns of their own."""
INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Deviation:
    """A tap point whose local error exceeds its tolerance."""

    point: str  # name of the tap point
    operator: str  # kind of the operator that computes it
    actual: np.ndarray  # MNN's values, [rows, values]
    expected: np.ndarray  # values that the ONNX graph computes from MNN's own inputs, [rows, values]
    tolerance: float  # allowed relative error
    last_axis: int  # size of the value's last axis; for a query or key that of a head


def _siblings(point: str, model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the nodes that compute the same linear layer of every block, by module."""
    siblings = {}
    for node in model.graph.node:
        for name in node.input if node.op_type in ("MatMul", "Gemm") else ():
            weight = WEIGHT.fullmatch(name)
            if weight and INDEX.sub(".*.", weight["module"]) == INDEX.sub(".*.", point):
                siblings[weight["module"]] = node
    return siblings


def _apply(matrices: Matrices, module: str, node: onnx.NodeProto, x: np.ndarray) -> np.ndarray:
    """Apply a linear layer of the graph to other inputs [rows, inputs]."""
    weight = matrices.read(node.input[1])
    transposed = node.op_type == "Gemm" and any(given.name == "transB" and given.i for given in node.attribute)
    product = x @ (weight.T if transposed else weight)
    return product + matrices.read(f"{module}.bias") if f"{module}.bias" in matrices.initializers else product


def _swapped_weights(deviation: Deviation, model: onnx.ModelProto, source: Path, value: Value) -> str:
    nodes = _siblings(deviation.point, model)
    if deviation.point not in nodes:
        return ""
    x = as_matrix(value(next(name for name in nodes[deviation.point].input if ".weight" not in name)))
    matrices = Matrices(model, source.parent)
    for module, node in nodes.items():
        if module != deviation.point:
            other = _apply(matrices, module, node, x)
            if relative_error(other, deviation.actual) <= deviation.tolerance:
                return f"it has the weights of {module}"
    return ""


def _flipped_sign(deviation: Deviation, unrotated: np.ndarray) -> str:
    """Recognize a flipped sign in RoPE.

    RoPE rotates pairs (a, b), a from the first half of a head and b from the second: z = a + ib becomes z e^(it). With
    a flipped sign, one half or both are those of z e^(-it) = z^2 / (z e^(it)).
    """
    shape = (len(deviation.expected), -1, 2, deviation.last_axis // 2)
    halves = (value.reshape(shape).astype(np.float64) for value in (unrotated, deviation.expected, deviation.actual))
    z, rotated, actual = (half[:, :, 0] + 1j * half[:, :, 1] for half in halves)
    inverse = np.divide(z**2, rotated, out=np.zeros_like(z), where=np.abs(rotated) > 1e-12)

    def equal_halves(right: np.ndarray) -> list[str]:
        pairs = {"first": (right.real, actual.real), "second": (right.imag, actual.imag)}
        close = max(deviation.tolerance, 1e-3)
        return [name for name, (expected, half) in pairs.items() if relative_error(expected, half) <= close]

    flipped, intact = equal_halves(inverse), equal_halves(rotated)
    if not flipped or len(flipped) + len(intact) < 2:
        return ""
    return f"a sign is flipped in {'both halves' if len(flipped) == 2 else f'the {flipped[0]} half'} of the rotation"


def recognize_pattern(deviation: Deviation, model: onnx.ModelProto, source: Path, value: Value) -> str:
    """Describe what the operator computes instead; "" if no known pattern matches.

    `model` is the ONNX graph of the part, and `source` its file.
    """
    if not deviation.actual.any():
        return "it gives only zeros"
    if deviation.operator == LINEAR_LAYER:
        return _swapped_weights(deviation, model, source, value)
    if deviation.operator == ROTATION:
        attention, _, last = deviation.point.rpartition(".")
        projection = f"{attention}.{'q' if last == 'query' else 'k'}_proj"
        if any(projection in node.output for node in model.graph.node):
            return _flipped_sign(deviation, as_matrix(value(projection)))
    return ""
