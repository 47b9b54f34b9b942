"""Decoders without the engine's KV cache, each as a conversion that prints success leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from faults import unfused_attention
from hf2mnn.core.errors import ConversionError
from hf2mnn.doctor.examine import examine
from hf2mnn.doctor.finding import Severity
from hf2mnn.mnn.bundle import DECODER, MODEL_CONFIG, convert_decoder
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.mnn.graph import Graph
from patients import copied, edited, errors, found, own, vouched

PAST = "past_key_values"


@pytest.fixture(scope="module")
def without_flag(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder was converted without --transformerFuse."""
    bundle = copied(results / "bundles" / "int8", tmp_path_factory.mktemp("unfused") / "bundle")
    for name in (DECODER, f"{DECODER}.weight"):
        (bundle / name).unlink()
    with pytest.raises(ConversionError, match="0 of 4 attentions fused"):
        convert_decoder(results / "onnx", bundle, 4, WeightFormat(8, 64), fuse=False)
    vouched(bundle)
    return bundle


def test_without_the_flag(without_flag: Path) -> None:
    assert errors(without_flag) == {"past_key_values_input"}
    assert [f.check for f in examine(without_flag / DECODER) if f.severity == Severity.ERROR] == [
        "past_key_values_input"
    ]


def test_past_cut_by_hand(without_flag: Path, tmp_path: Path) -> None:
    """Each Concat of past and new gives only what is new, and nothing reads the past any more."""

    def cut(graph: Graph) -> None:
        (past,) = [op for op in graph.of_type("Input") if op["name"] == PAST]
        gone, same, kept = set(past["outputIndexes"]), {}, []
        for op in graph.ops:
            read = op.get("inputIndexes", [])
            if op is past or (op["type"] != "Concat" and gone.intersection(read)):
                gone |= set(op["outputIndexes"])
            elif op["type"] == "Concat" and gone.intersection(read):
                same[op["outputIndexes"][0]] = next(index for index in read if index not in gone)
            else:
                kept.append(op)
        for op in kept:
            op["inputIndexes"] = [same.get(index, index) for index in op.get("inputIndexes", [])]
        graph.content["oplists"] = kept

    bundle = copied(without_flag, tmp_path / "cut")
    edited(bundle, cut)
    vouched(bundle)
    assert errors(bundle) == {"past_branch_cut"}


def test_one_attention_is_not_the_chain(results: Path, tmp_path: Path) -> None:
    bundle = copied(results / "bundles" / "fp32", tmp_path / "bundle")
    for name in (DECODER, f"{DECODER}.weight"):
        (bundle / name).unlink()
    unfused_attention(bundle, results / "onnx")
    vouched(bundle)
    assert errors(bundle) == {"attention_not_fused"}
    assert "3 attentions with a KV cache, 1 without" in found(bundle)["attention_not_fused"].evidence


def test_another_number_of_layers(results: Path, tmp_path: Path) -> None:
    bundle = copied(results / "bundles" / "int4", tmp_path / "bundle")
    config = json.loads(own(bundle / MODEL_CONFIG).read_text())
    (bundle / MODEL_CONFIG).write_text(json.dumps(config | {"layer_nums": 5}))
    vouched(bundle)
    assert errors(bundle) == {"fused_count"}
    edited(bundle, lambda graph: graph.fused[0]["main"].update(kv_cache=False))
    (said,) = [f.check for f in examine(bundle / DECODER) if f.severity == Severity.ERROR]
    assert said == "attention_not_fused"


# ONNX


def _change(results: Path, tmp_path: Path, change: Callable[[onnx.GraphProto], object]) -> Path:
    model = onnx.load(results / "onnx" / "decoder.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, tmp_path / "decoder.onnx")
    return tmp_path / "decoder.onnx"


def test_onnx_without_past(results: Path, tmp_path: Path) -> None:
    def drop(graph: onnx.GraphProto) -> None:
        graph.input.remove(next(value for value in graph.input if value.name == PAST))

    assert errors(_change(results, tmp_path, drop)) == {"onnx_without_past"}


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def _plus_zero(graph: onnx.GraphProto) -> None:
    scores = _node(graph, "attention_2/scores")
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    graph.node.append(helper.make_node("Add", [scores.input[0], "zero"], ["plus"], "plus"))
    scores.input[0] = "plus"


def _mask_first(graph: onnx.GraphProto) -> None:
    masked = _node(graph, "attention_2/masked")
    masked.input[:] = masked.input[::-1]


def _no_past(graph: onnx.GraphProto) -> None:
    _node(graph, "attention_2/value_heads").input[0] = "attention_2/value"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_plus_zero, "its query is not transposed"),
        (_mask_first, "its scores are not scaled between MatMul and mask"),
        (_no_past, "its value is not joined with a past"),
    ],
)
def test_onnx_attention_that_will_not_fuse(results: Path, tmp_path: Path, change: Callable, why: str) -> None:
    said = found(_change(results, tmp_path, change), Severity.ERROR)
    assert said.keys() == {"onnx_attention_chain"}
    assert why in said["onnx_attention_chain"].evidence and "1 of 4" in said["onnx_attention_chain"].evidence
