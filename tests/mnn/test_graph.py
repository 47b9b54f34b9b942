"""MNN graphs: exact constants, and outputs for any of their values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import mnn_quantizer
from hf2mnn.core.errors import ConversionError
from hf2mnn.evaluation.layers import GraphInputs, OnnxGraph, run_mnn
from hf2mnn.metrics import relative_error
from hf2mnn.mnn.convert import read_graph
from hf2mnn.mnn.graph import Graph, check_fused
from hf2mnn.onnx.initializers import float_values

LAYERS = 2
FREQUENCIES = {
    "llm": ("decoder.onnx", "model.language_model.rotary_emb.inv_freq"),
    "visual": ("vision.onnx", "model.visual.rotary_pos_emb.inv_freq"),
}
MLP = "model.language_model.layers.0.mlp"


# Constants


@pytest.mark.parametrize("name", FREQUENCIES)
def test_rotary_frequencies_are_exactly_the_onnx_graphs(
    onnx_folder: Path, graphs: Path, bundle: Path, name: str
) -> None:
    """In the JSON of the convert stage and in the .mnn file of the bundle, as the bytes of its flatbuffer."""
    source, constant = FREQUENCIES[name]
    exact = float_values(onnx_folder / source)[constant]
    (op,) = [op for op in read_graph(graphs / f"{name}.json").of_type("Const") if op["name"] == constant]
    assert op["main"]["float32s"] == exact.reshape(-1).tolist()
    assert exact.astype("<f4").tobytes() in (bundle / f"{name}.mnn").read_bytes()


def test_only_float_constants_with_a_known_value_are_restored() -> None:
    def constant(name: str, kind: str, **values: Any) -> dict[str, Any]:
        return {"type": "Const", "name": name, "outputIndexes": [0], "main": {"dataType": kind, **values}}

    rounded, halved = constant("a", "DT_FLOAT", float32s=[0.333333]), constant("b", "DT_HALF", uint8s=[1, 2])
    others = [constant("c", "DT_INT32", int32s=[3]), constant("d", "DT_FLOAT", float32s=[0.1])]
    graph = Graph({"oplists": [rounded, halved, *others]})
    before = json.dumps(others)
    graph.restore_constants({name: np.array([1 / 3], np.float32) for name in "abc"})
    for op in (rounded, halved):
        assert op["main"] == {"dataType": "DT_FLOAT", "float32s": [float(np.float32(1 / 3))]}
    assert json.dumps(others) == before


def test_float_constants_are_those_in_the_file_itself(tmp_path: Path) -> None:
    """Initializers and Constant nodes, without integers and without weights, which are in another file."""
    arrays = {"f": np.array([0.1, 2], np.float32), "i": np.array([1]), "d": np.array([0.5])}
    inside = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    outside = numpy_helper.from_array(np.zeros(2, np.float32), "w")
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="nowhere.data")
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
        for name, array in (("node", np.array(3.5, np.float32)), ("count", np.array(4)))
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], [*inside, outside])), tmp_path / "g.onnx")
    values = float_values(tmp_path / "g.onnx")
    assert values.keys() == {"f", "node"}
    assert values["f"].tolist() == arrays["f"].tolist()
    assert values["node"] == 3.5


# Values


@pytest.fixture(scope="module")
def inputs() -> GraphInputs:
    tokens, random = 7, np.random.default_rng(0)
    embeds = random.standard_normal((tokens, 128)).astype(np.float32)
    shared = {
        "attention_mask": np.triu(np.full((1, 1, tokens, tokens), np.finfo(np.float32).min, np.float32), 1),
        "position_ids": np.sort(random.integers(0, 20, (3, tokens)), axis=1).astype(np.int32),
        "logits_index": np.array([0], np.int32),
    }
    past = {"past_key_values": np.zeros((LAYERS, 2, 1, 0, 2, 32), np.float32)}
    return GraphInputs(
        "p", "decoder", {"inputs_embeds": embeds[None], **past, **shared}, {"input_ids": embeds[:, None], **shared}
    )


@pytest.fixture(scope="module")
def expected(onnx_folder: Path, inputs: GraphInputs) -> dict[str, np.ndarray]:
    """Every tap point of the decoder in ONNX Runtime."""
    graph = OnnxGraph.load(onnx_folder, "decoder")
    return graph.run(inputs.onnx, [value for _, value in graph.points], {}, 1)


def run_decoder(bundle: Path, inputs: GraphInputs, graph: Graph, names: list[str]) -> dict[str, np.ndarray]:
    (values,) = run_mnn(bundle, [inputs], {"decoder": graph}, {"decoder": names}, 1, 60)
    return values


def test_values_are_those_of_onnx_runtime(bundle: Path, inputs: GraphInputs, expected: dict[str, np.ndarray]) -> None:
    """Every tap point but the key of each attention, which is inside the engine's operator, to five digits."""
    graph = read_graph(bundle / "llm.mnn")
    names = [name for name in expected if name in graph.values]
    assert len(names) >= len(expected) - LAYERS
    values = run_decoder(bundle, inputs, graph, names)
    assert values.keys() == set(names)
    for name in names:
        value = values[name].reshape(expected[name].shape)
        bound = 1e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], atol=bound, rtol=0, err_msg=name)


def test_queries_at_large_positions_are_right(onnx_folder: Path, bundle: Path, inputs: GraphInputs) -> None:
    """The error of a frequency is multiplied by the position: that of the converter's JSON is too large."""
    far = {"position_ids": inputs.onnx["position_ids"] + 3000}
    late = GraphInputs("p", "decoder", inputs.onnx | far, inputs.mnn | far)
    name = next(name for name in read_graph(bundle / "llm.mnn").values if name.endswith(".0.self_attn.query"))
    query = OnnxGraph.load(onnx_folder, "decoder").run(late.onnx, [name], {}, 1)[name].reshape(-1)
    errors = []
    for exact in ({}, float_values(onnx_folder / "decoder.onnx")):
        graph = read_graph(bundle / "llm.mnn")
        graph.restore_constants(exact, rounded_only=True)
        errors.append(relative_error(query, run_decoder(bundle, late, graph, [name])[name].reshape(-1)))
    rounded, restored = errors
    assert restored < 2e-5 < rounded


class ByTensorName(Graph):
    """A graph whose values are the tensors with their names."""

    def _producers(self) -> dict[str, tuple[dict[str, Any], int]]:
        names = self.content["tensorName"]
        return {names[index]: (op, index) for op in self.ops for index in op["outputIndexes"]}


def test_the_tensor_with_a_layers_name_may_hold_the_next_operators_output(
    onnx_folder: Path, bundle: Path, inputs: GraphInputs, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """MNN's converter moves the activation between its changes of layout: the tensor gate_proj is its output.

    In our graphs it is the output of gate_proj.
    """
    name = f"{MLP}.gate_proj"
    value = expected[name]
    ours = run_decoder(bundle, inputs, ByTensorName(read_graph(bundle / "llm.mnn").content), [name])
    np.testing.assert_allclose(ours[name].reshape(value.shape), value, atol=1e-5)
    theirs = Path(shutil.copytree(bundle, tmp_path / "theirs"))
    graph = mnn_quantizer.convert_decoder(onnx_folder, theirs, LAYERS)
    tensor = run_decoder(theirs, inputs, ByTensorName(graph.content), [name])[name].reshape(value.shape)
    np.testing.assert_allclose(tensor, value / (1 + np.exp(-value)), atol=1e-5)
    assert np.abs(tensor - value).max() > 0.1


def test_outputs_are_added_to_a_copy_of_the_graph(bundle: Path) -> None:
    graph = read_graph(bundle / "llm.mnn")
    before = json.dumps(graph.content)
    extended, outputs = graph.with_outputs([f"{MLP}.down_proj", f"{MLP}.gate_proj"])
    assert json.dumps(graph.content) == before
    assert extended.outputs[: len(graph.outputs)] == graph.outputs
    assert sorted(extended.outputs[len(graph.outputs) :]) == sorted(outputs.values())
    assert len(extended.ops) == len(graph.ops) + 2
    with pytest.raises(KeyError):
        graph.with_outputs(["no.such.value"])


def test_an_attention_without_kv_cache_is_not_fused() -> None:
    def attention(cached: bool) -> dict[str, Any]:
        return {"type": "Attention", "main": {"kv_cache": cached}, "outputIndexes": [0], "name": "a"}

    check_fused(Graph({"oplists": [attention(True)] * 2}), "llm.mnn", 2)
    with pytest.raises(ConversionError, match="1 of 2 attentions fused"):
        check_fused(Graph({"oplists": [attention(True), attention(False)]}), "llm.mnn", 2)
