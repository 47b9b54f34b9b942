"""What an operator that is wrong looks like: nothing at all, another layer's weights, a sign."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from hf2mnn.metrics import relative_error
from hf2mnn.onnx.initializers import Matrices
from hf2mnn.onnx.tap_points import WEIGHT
from hf2mnn.reference.tap_points import as_rows

Value = Callable[[str], np.ndarray]
INDEX = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Sight:
    """A point out of tolerance: what MNN computes there and what is right given MNN's own inputs, [rows, values].
    `group` is the size of the value's last axis: of an attention's query, that of a head.
    """

    point: str
    operator: str
    seen: np.ndarray
    right: np.ndarray
    tolerance: float
    group: int


def _siblings(point: str, model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The same linear layer in every block, with the node that computes it."""
    pattern = re.compile(INDEX.sub(r".\\d+.", re.escape(point).replace(r"\.", ".")))
    for node in model.graph.node:
        for name in node.input:
            weight = WEIGHT.fullmatch(name) if node.op_type in ("MatMul", "Gemm") else None
            if weight and pattern.fullmatch(weight["module"]):
                yield weight["module"], node


def _apply(matrices: Matrices, module: str, node: onnx.NodeProto, x: np.ndarray) -> np.ndarray:
    """A linear layer of the graph on other inputs [rows, inputs]."""
    weight = matrices.read(node.input[1])
    flipped = node.op_type == "Gemm" and any(held.name == "transB" and held.i for held in node.attribute)
    product = x @ (weight.T if flipped else weight)
    return product + matrices.read(f"{module}.bias") if f"{module}.bias" in matrices.initializers else product


def _others_weights(sight: Sight, model: onnx.ModelProto, source: Path, value: Value) -> str:
    nodes = dict(_siblings(sight.point, model))
    if sight.point not in nodes:
        return ""
    x = as_rows(value(next(name for name in nodes[sight.point].input if ".weight" not in name)))
    matrices = Matrices(model, source.parent)
    for module, node in nodes.items():
        if module != sight.point:
            other = _apply(matrices, module, node, x)
            if relative_error(other, sight.seen) <= sight.tolerance:
                return f"it has the weights of {module}"
    return ""


def _turned_back(sight: Sight, unrotated: np.ndarray) -> str:
    """A rotation turns pairs (a, b), a from the first half of a head and b from the second: z = a + ib times e^(i t).
    With a sign flipped, one half or both come from z times e^(-i t), which is z^2 over the right value times |z|^2.
    """
    shape = (len(sight.right), -1, 2, sight.group // 2)
    z, right, seen = (value.reshape(shape).astype(np.float64) for value in (unrotated, sight.right, sight.seen))
    z, turned = z[:, :, 0] + 1j * z[:, :, 1], right[:, :, 0] + 1j * right[:, :, 1]
    back = np.divide(z**2, turned, out=np.zeros_like(z), where=np.abs(turned) > 1e-12)
    halves = {"first": (seen[:, :, 0], turned.real, back.real), "second": (seen[:, :, 1], turned.imag, back.imag)}
    close = max(sight.tolerance, 1e-3)
    wrong = [name for name, (value, _, other) in halves.items() if relative_error(other, value) <= close]
    kept = [name for name, (value, good, _) in halves.items() if relative_error(good, value) <= close]
    if not wrong or len(wrong) + len(kept) < 2:
        return ""
    return f"a sign is flipped in {'both halves' if len(wrong) == 2 else f'the {wrong[0]} half'} of the rotation"


def look(sight: Sight, model: onnx.ModelProto, source: Path, value: Value) -> str:
    """A clause that says what the operator does instead, or "" where it looks like nothing known. `model` is the graph
    of the file `source`; `value` gives what its values are, by name, given MNN's points.
    """
    if not sight.seen.any():
        return "it gives only zeros"
    if sight.operator == "linear layer":
        return _others_weights(sight, model, source, value)
    if sight.operator == "rotary position embedding":
        parent, _, last = sight.point.rpartition(".")
        projection = f"{parent}.{'q' if last == 'query' else 'k'}_proj"
        made = any(projection in node.output for node in model.graph.node)
        return _turned_back(sight, as_rows(value(projection))) if made else ""
    return ""
