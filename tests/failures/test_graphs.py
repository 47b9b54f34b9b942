"""MNN's own parsers under hostile .mnn files: native code in a child process, which may die but not take us with it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.convert import WeightFormat, convert_onnx, read_graph
from hf2mnn.mnn.graph import Graph

CASES, SECONDS = 60, 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small network as MNN stores it."""
    folder = tmp_path_factory.mktemp("graph")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32]) for name in "xy")
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Softmax", ["z"], ["y"])]
    made = helper.make_graph(nodes, "g", [x], [y], initializer=[weight])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "x.onnx")
    convert_onnx(folder / "x.onnx", folder / "x.mnn", WeightFormat())
    return (folder / "x.mnn").read_bytes()


def broken(content: bytes, case: int) -> bytes:
    """Cut short, or with numbers of flatbuffers' kinds (offsets, lengths, tables) overwritten."""
    chance, made = random.Random(case), bytearray(content)
    if case % 5 == 0:
        return content[: chance.randrange(len(content))]
    for _ in range(chance.choice((1, 1, 4, 16))):
        place = chance.randrange(0, len(made) - 4, 4 if case % 2 else 1)
        made[place : place + 4] = chance.choice(
            (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", chance.randbytes(4))
        )
    return bytes(made)


def test_every_broken_model_gives_a_graph_or_a_sentence(model: bytes, tmp_path: Path) -> None:
    path, outcomes = tmp_path / "x.mnn", {"read": 0, "refused": 0}
    for case in range(CASES):
        path.write_bytes(broken(model, case))
        begun = time.monotonic()
        try:
            assert isinstance(read_graph(path, SECONDS), Graph)
            outcomes["read"] += 1
        except ConversionError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
        assert time.monotonic() - begun < SECONDS + 10
    assert outcomes["refused"] > CASES // 5  # those cut short, at least
