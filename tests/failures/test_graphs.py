"""Hostile .mnn files in MNN's own parsers, which run in a child process that may crash."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.convert import convert_onnx, read_graph, write_graph
from hf2mnn.mnn.graph import Graph

CASES, SECONDS = 60, 30.0
"""`read_graph` stops a converter that takes longer than SECONDS."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A .mnn file of a small network."""
    folder = tmp_path_factory.mktemp("graph")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32]) for name in "xy")
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Softmax", ["z"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=[weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "x.onnx")
    write_graph(convert_onnx(folder / "x.onnx", folder / "x.mnn.weight"), folder / "x.mnn")
    return (folder / "x.mnn").read_bytes()


def damage(content: bytes, case: int) -> bytes:
    """Truncate the file, or overwrite numbers of the flatbuffer (offsets, lengths, tables)."""
    rng, changed = random.Random(case), bytearray(content)
    if case % 5 == 0:
        return content[: rng.randrange(len(content))]
    for _ in range(rng.choice((1, 1, 4, 16))):
        offset = rng.randrange(0, len(changed) - 4, 4 if case % 2 else 1)
        changed[offset : offset + 4] = rng.choice(
            (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", rng.randbytes(4))
        )
    return bytes(changed)


def test_damaged_models_give_a_graph_or_an_error(model: bytes, tmp_path: Path) -> None:
    path, outcomes = tmp_path / "x.mnn", {"read": 0, "refused": 0}
    for case in range(CASES):
        path.write_bytes(damage(model, case))
        try:
            assert isinstance(read_graph(path, SECONDS), Graph)
            outcomes["read"] += 1
        except ConversionError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
    assert outcomes["refused"] > CASES // 5  # at least the truncated ones
