"""Decoders without the engine's KV cache, as conversions write them that print success."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from faults import unfused_attention
from faulty_bundles import convert_part, edit_graph, errors, file_findings, link_copy, unlink_copy, update_manifest
from hf2mnn.doctor.findings import Severity
from hf2mnn.mnn.bundle import DECODER, MODEL_CONFIG
from hf2mnn.mnn.graph import Graph

PAST = "past_key_values"


@pytest.fixture(scope="module")
def without_flag(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose decoder was converted without --transformerFuse."""
    bundle = link_copy(results / "bundles" / "int8", tmp_path_factory.mktemp("unfused") / "bundle")
    model = onnx.load(results / "onnx" / "decoder.onnx", load_external_data=False)
    convert_part(model, "decoder", results / "onnx", bundle, options=())
    update_manifest(bundle)
    return bundle


def test_past_key_values_input(without_flag: Path) -> None:
    assert errors(without_flag) == {"past_key_values_input"}
    assert errors(without_flag / DECODER) == {"past_key_values_input"}


def test_past_branch_cut(without_flag: Path, tmp_path: Path) -> None:
    """Each Concat of past and new keys passes on the new ones only, and the input of the past is removed."""

    def cut(graph: Graph) -> None:
        (past,) = [op for op in graph.of_type("Input") if op["name"] == PAST]
        removed, replaced, kept = set(past["outputIndexes"]), {}, []
        for op in graph.ops:
            read = op.get("inputIndexes", [])
            if op is past or (op["type"] != "Concat" and removed.intersection(read)):
                removed |= set(op["outputIndexes"])
            elif op["type"] == "Concat" and removed.intersection(read):
                replaced[op["outputIndexes"][0]] = next(index for index in read if index not in removed)
            else:
                kept.append(op)
        for op in kept:
            op["inputIndexes"] = [replaced.get(index, index) for index in op.get("inputIndexes", [])]
        graph.content["oplists"] = kept

    bundle = link_copy(without_flag, tmp_path / "cut")
    edit_graph(bundle, cut)
    update_manifest(bundle)
    assert errors(bundle) == {"past_branch_cut"}


def test_attention_not_fused(results: Path, tmp_path: Path) -> None:
    bundle = link_copy(results / "bundles" / "fp32", tmp_path / "bundle")
    unfused_attention(bundle, results / "onnx")
    update_manifest(bundle)
    assert errors(bundle) == {"attention_not_fused"}
    assert "3 attentions with a KV cache, 1 without" in file_findings(bundle)["attention_not_fused"].evidence


def test_fused_count(results: Path, tmp_path: Path) -> None:
    bundle = link_copy(results / "bundles" / "int4", tmp_path / "bundle")
    config = json.loads(unlink_copy(bundle / MODEL_CONFIG).read_text())
    (bundle / MODEL_CONFIG).write_text(json.dumps(config | {"layer_nums": 5}))
    update_manifest(bundle)
    assert errors(bundle) == {"fused_count"}
    edit_graph(bundle, lambda graph: graph.fused[0]["main"].update(kv_cache=False))
    assert errors(bundle / DECODER) == {"attention_not_fused"}


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
        (_no_past, "its value is not concatenated with a past"),
    ],
)
def test_onnx_attention_chain(results: Path, tmp_path: Path, change: Callable, why: str) -> None:
    findings = file_findings(_change(results, tmp_path, change), Severity.ERROR)
    assert findings.keys() == {"onnx_attention_chain"}
    evidence = findings["onnx_attention_chain"].evidence
    assert why in evidence and "1 of 4" in evidence
