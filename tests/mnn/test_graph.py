"""What is inside a converted graph: its constants exact, and any of its values to be looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf2mnn.core.errors import ConversionError
from hf2mnn.evaluation.layers import Part, Portable, _run_mnn
from hf2mnn.metrics import relative_error
from hf2mnn.mnn.bundle import convert_decoder, convert_vision
from hf2mnn.mnn.convert import WeightFormat, read_graph
from hf2mnn.mnn.graph import Graph, prove_fused
from hf2mnn.onnx.initializers import float_values

LAYERS = 2
FREQUENCIES = {
    "llm.mnn": "model.language_model.rotary_emb.inv_freq",
    "visual.mnn": "model.visual.rotary_pos_emb.inv_freq",
}
MLP = "model.language_model.layers.0.mlp"
FORMATS = [WeightFormat(), WeightFormat(16), WeightFormat(4, 64)]


def exact(onnx_folder: Path, file: str) -> bytes:
    """The rotary frequencies as the ONNX graph has them, in the bytes of a flatbuffer."""
    source = onnx_folder / ("decoder.onnx" if file == "llm.mnn" else "vision.onnx")
    return float_values(source)[FREQUENCIES[file]].astype("<f4").tobytes()


def convert(onnx_folder: Path, folder: Path, weights: WeightFormat) -> dict[str, bytes]:
    convert_decoder(onnx_folder, folder, LAYERS, weights)
    convert_vision(onnx_folder, folder, WeightFormat(8) if weights.bits < 16 else weights)
    return {file: (folder / file).read_bytes() for file in FREQUENCIES}


# Constants


@pytest.mark.parametrize("weights", FORMATS, ids=lambda weights: str(weights.bits))
def test_rotary_frequencies_are_exactly_the_onnx_graphs(
    onnx_folder: Path, tmp_path: Path, weights: WeightFormat
) -> None:
    for file, content in convert(onnx_folder, tmp_path, weights).items():
        assert exact(onnx_folder, file) in content, file


@pytest.mark.parametrize(("weights", "error"), [(WeightFormat(), 5e-4), (WeightFormat(16), 1e-4)])
def test_without_restoring_them_they_would_be_rounded(
    onnx_folder: Path, tmp_path: Path, weights: WeightFormat, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the trap is there: six decimals by way of the dump, half floats by --fp16, both multiplied by positions."""
    monkeypatch.setattr(Graph, "restore_constants", lambda *_: None)
    for file, content in convert(onnx_folder, tmp_path, weights).items():
        assert exact(onnx_folder, file) not in content, file
    (constant,) = [op for op in read_graph(tmp_path / "llm.mnn").of_type("Const") if op["name"].endswith("inv_freq")]
    right = np.frombuffer(exact(onnx_folder, "llm.mnn"), np.float32)
    if weights.bits == 16:
        assert constant["main"]["dataType"] == "DT_HALF"
        kept = np.array(constant["main"]["uint8s"], np.int16).astype(np.uint8).view(np.float16)
    else:
        kept = np.array(constant["main"]["float32s"], np.float32)
    assert np.abs(kept / right - 1).max() > error


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
    """Initializers and Constant nodes; no integers, and no weights, which are in another file."""
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
    found = float_values(tmp_path / "g.onnx")
    assert found.keys() == {"f", "node"}
    assert found["f"].tolist() == arrays["f"].tolist()
    assert found["node"] == 3.5


# Values


@pytest.fixture(scope="module")
def inputs(onnx_folder: Path) -> Part:
    tokens, random = 7, np.random.default_rng(0)
    embeds = random.standard_normal((tokens, 128)).astype(np.float32)
    shared = {
        "attention_mask": np.triu(np.full((1, 1, tokens, tokens), np.finfo(np.float32).min, np.float32), 1),
        "position_ids": np.sort(random.integers(0, 20, (3, tokens)), axis=1).astype(np.int32),
        "logits_index": np.array([0], np.int32),
    }
    past = {"past_key_values": np.zeros((LAYERS, 2, 1, 0, 2, 32), np.float32)}
    return Part(
        "p", "decoder", {"inputs_embeds": embeds[None], **past, **shared}, {"input_ids": embeds[:, None], **shared}
    )


@pytest.fixture(scope="module")
def right(onnx_folder: Path, inputs: Part) -> dict[str, np.ndarray]:
    """Every point of the decoder by ONNX Runtime."""
    portable = Portable.load(onnx_folder, "decoder")
    return portable.run(inputs.onnx, [value for _, value in portable.points], {}, 1)


def see(bundle: Path, inputs: Part, graph: Graph, wanted: list[str]) -> dict[str, np.ndarray]:
    (values,) = _run_mnn(bundle, [inputs], {"decoder": graph}, {"decoder": wanted}, 1, 60)
    return values


def test_watched_values_are_onnx_runtimes(bundle: Path, inputs: Part, right: dict[str, np.ndarray]) -> None:
    """Every point but the attention's key, where the engine's operator leaves none, to five digits."""
    graph = read_graph(bundle / "llm.mnn")
    wanted = [name for name in right if name in graph.values]
    assert len(wanted) >= len(right) - LAYERS
    seen = see(bundle, inputs, graph, wanted)
    assert seen.keys() == set(wanted)
    for name in wanted:
        value = seen[name].reshape(right[name].shape)
        np.testing.assert_allclose(value, right[name], atol=1e-5 * np.abs(right[name]).max(), rtol=0, err_msg=name)


def test_queries_far_into_a_long_text_are_right(onnx_folder: Path, bundle: Path, inputs: Part) -> None:
    """A frequency's error counts as often as there are tokens before: what the dump rounds shows here, in the graph
    that is only looked into as in a bundle's.
    """
    far = {"position_ids": inputs.onnx["position_ids"] + 3000}
    late = Part("p", "decoder", inputs.onnx | far, inputs.mnn | far)
    name = next(name for name in read_graph(bundle / "llm.mnn").values if name.endswith(".0.self_attn.query"))
    wanted = Portable.load(onnx_folder, "decoder").run(late.onnx, [name], {}, 1)[name].reshape(-1)
    errors = []
    for exact in ({}, float_values(onnx_folder / "decoder.onnx")):
        graph = read_graph(bundle / "llm.mnn")
        graph.sharpen_constants(exact)
        errors.append(relative_error(wanted, see(bundle, late, graph, [name])[name].reshape(-1)))
    rounded, sharpened = errors
    assert sharpened < 2e-5 < rounded


class Naive(Graph):
    """Watches the tensor that has the value's name."""

    def _producers(self) -> dict[str, tuple[dict[str, Any], int]]:
        names = self.content["tensorName"]
        return {names[index]: (op, index) for op in self.ops for index in op["outputIndexes"]}


def test_the_tensor_with_a_layers_name_may_hold_what_follows(
    onnx_folder: Path, bundle: Path, inputs: Part, right: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """MNN's converter moves the activation into its own sandwich of layouts: by its name gate_proj is silu of it. In
    ours it is what it is called.
    """
    value = right[f"{MLP}.gate_proj"]
    ours = see(bundle, inputs, Naive(read_graph(bundle / "llm.mnn").content), [f"{MLP}.gate_proj"])
    np.testing.assert_allclose(ours[f"{MLP}.gate_proj"].reshape(value.shape), value, atol=1e-5)
    theirs = Path(shutil.copytree(bundle, tmp_path / "theirs"))
    convert_decoder(onnx_folder, theirs, LAYERS, WeightFormat())
    graph = read_graph(theirs / "llm.mnn")
    naive = see(theirs, inputs, Naive(graph.content), [f"{MLP}.gate_proj"])[f"{MLP}.gate_proj"].reshape(value.shape)
    activated = value / (1 + np.exp(-value))
    np.testing.assert_allclose(naive, activated, atol=1e-5)
    assert np.abs(naive - value).max() > 0.1


def test_watching_leaves_the_graph_alone_and_adds_outputs_behind_its_own(bundle: Path) -> None:
    graph = read_graph(bundle / "llm.mnn")
    before = json.dumps(graph.content)
    watched, given = graph.watched([f"{MLP}.down_proj", f"{MLP}.gate_proj"])
    assert json.dumps(graph.content) == before
    assert watched.outputs[: len(graph.outputs)] == graph.outputs
    assert sorted(watched.outputs[len(graph.outputs) :]) == sorted(given.values())
    assert len(watched.ops) == len(graph.ops) + 2
    with pytest.raises(KeyError):
        graph.watched(["nothing.of.the.kind"])


def test_a_layer_that_is_not_fused_is_noticed_by_its_operator() -> None:
    def attention(cached: bool) -> dict[str, Any]:
        return {"type": "Attention", "main": {"kv_cache": cached}, "outputIndexes": [0], "name": "a"}

    prove_fused(Graph({"oplists": [attention(True)] * 2}), "llm.mnn", 2)
    with pytest.raises(ConversionError, match="1 of 2 attentions fused"):
        prove_fused(Graph({"oplists": [attention(True), attention(False)]}), "llm.mnn", 2)
