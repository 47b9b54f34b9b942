"""Recognition of wrong operators, on small operators with each fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hf2mnn.evaluation.fault_patterns import Deviation, recognize_pattern

RANDOM = np.random.default_rng(0)
INPUT = RANDOM.normal(size=(9, 6)).astype(np.float32)
WEIGHTS = {f"m.layers.{i}.fc": RANDOM.normal(size=(6, 4)).astype(np.float32) for i in range(3)}
BIASES = {name: RANDOM.normal(size=4).astype(np.float32) for name in WEIGHTS}


def linear_layers() -> onnx.ModelProto:
    """Return one layer in three blocks: a MatMul, a Gemm with transB, a MatMul without bias; and a layer `fc2`."""
    flipped, bare, other = "m.layers.1.fc", "m.layers.2.fc", "m.layers.1.fc2"
    stored = {f"{name}.weight.T": weight for name, weight in WEIGHTS.items() if name != flipped}
    stored |= {f"{flipped}.weight": np.ascontiguousarray(WEIGHTS[flipped].T), f"{other}.weight.T": WEIGHTS[flipped] * 2}
    stored |= {f"{name}.bias": bias for name, bias in BIASES.items() if name != bare}
    nodes = [
        helper.make_node("MatMul", ["x", "m.layers.0.fc.weight.T"], ["product"]),
        helper.make_node("Add", ["product", "m.layers.0.fc.bias"], ["m.layers.0.fc"]),
        helper.make_node("Gemm", ["x", f"{flipped}.weight", f"{flipped}.bias"], [flipped], transB=1),
        helper.make_node("MatMul", ["x", f"{bare}.weight.T"], [bare]),
        helper.make_node("MatMul", ["x", f"{other}.weight.T"], [other]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [], [], initializers))


def right_of(name: str) -> np.ndarray:
    return INPUT @ WEIGHTS[name] + (0 if name.endswith("2.fc") else BIASES[name])


def recognized(
    actual: np.ndarray, point: str = "m.layers.0.fc", operator: str = "linear layer", tolerance: float = 1e-4
) -> str:
    expected = right_of(point) if point in WEIGHTS else actual + 1
    deviation = Deviation(point, operator, actual, expected, tolerance, actual.shape[-1])
    return recognize_pattern(deviation, linear_layers(), Path(), {"x": INPUT}.get)


@pytest.mark.parametrize("point", WEIGHTS)
@pytest.mark.parametrize("other", WEIGHTS)
def test_weights_of_another_block_are_recognized(point: str, other: str) -> None:
    """The graph may have a bias, or the weight transposed. A layer's own weights are right."""
    assert recognized(right_of(other), point) == (f"it has the weights of {other}" if other != point else "")


def test_rounded_weights_are_recognized_within_tolerance() -> None:
    rounded = right_of("m.layers.2.fc") * 1.05
    assert recognized(rounded, tolerance=0.1) == "it has the weights of m.layers.2.fc"
    assert recognized(rounded, tolerance=0.01) == ""


def test_a_layer_of_another_name_or_kind_is_no_sibling() -> None:
    """`fc2` is not `fc`; values that no layer computes match no layer."""
    assert recognized(INPUT @ WEIGHTS["m.layers.1.fc"] * 2) == ""
    assert recognized(RANDOM.normal(size=(9, 4))) == ""
    assert recognized(right_of("m.layers.1.fc"), point="m.norm") == ""
    assert recognized(right_of("m.layers.1.fc"), operator="normalization") == ""


@pytest.mark.parametrize("operator", ["linear layer", "normalization", "attention", "rotary position embedding"])
def test_zeros_are_recognized(operator: str) -> None:
    assert recognized(np.zeros((9, 4)), operator=operator) == "it gives only zeros"


def rotate(pairs: np.ndarray, angles: np.ndarray, first: int = 1, second: int = 1) -> np.ndarray:
    """Rotate [rows, heads, 2 halves, size / 2]; -1 flips the sign of the sine in that half."""
    a, b = pairs[:, :, 0], pairs[:, :, 1]
    rotated = [a * np.cos(angles) - first * b * np.sin(angles), b * np.cos(angles) + second * a * np.sin(angles)]
    return np.stack(rotated, axis=2).reshape(len(pairs), -1)


@pytest.mark.parametrize("kind", ["query", "key"])
@pytest.mark.parametrize(
    ("first", "second", "detail"),
    [
        (-1, 1, "a sign is flipped in the first half of the rotation"),
        (1, -1, "a sign is flipped in the second half of the rotation"),
        (-1, -1, "a sign is flipped in both halves of the rotation"),
        (1, 3, ""),
        (0, 1, ""),
    ],
)
def test_a_flipped_sign_is_distinguished_from_another_rotation(kind: str, first: int, second: int, detail: str) -> None:
    pairs, angles = RANDOM.normal(size=(7, 3, 2, 5)), np.arange(7)[:, None, None] * 0.3 ** np.arange(5)
    right, actual = (rotate(pairs, angles, *signs).astype(np.float32) for signs in ((1, 1), (first, second)))
    point, projection = f"m.self_attn.{kind}", f"m.self_attn.{kind[0]}_proj"
    node = helper.make_node("MatMul", ["x", f"{projection}.weight.T"], [projection])
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    deviation = Deviation(point, "rotary position embedding", actual, right, 1e-4, 10)
    assert recognize_pattern(deviation, model, Path(), {projection: pairs.reshape(7, -1)}.get) == detail


def test_a_rotation_by_another_angle_is_no_flipped_sign() -> None:
    """Positions off by one and frequencies of another base are not recognized."""
    pairs, angles = RANDOM.normal(size=(7, 3, 2, 5)), np.arange(7)[:, None, None] * 0.3 ** np.arange(5)
    node = helper.make_node("MatMul", ["x", "m.self_attn.q_proj.weight.T"], ["m.self_attn.q_proj"])
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    for wrong in (angles + 1, angles * 2):
        values = rotate(pairs, wrong), rotate(pairs, angles)
        deviation = Deviation("m.self_attn.query", "rotary position embedding", *values, 1e-4, 10)
        assert recognize_pattern(deviation, model, Path(), {"m.self_attn.q_proj": pairs.reshape(7, -1)}.get) == ""


def test_a_rotation_without_its_projection_in_the_graph_is_not_recognized() -> None:
    """A vision tower has one projection for query, key and value."""
    assert recognized(np.ones((9, 4)), point="m.attn.query", operator="rotary position embedding") == ""
