"""Layer comparison: the accumulated error grows from a fault on, the local error is at the fault only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf2mnn.evaluation import layers
from hf2mnn.evaluation.layers import (
    COLUMNS,
    GraphInputs,
    OnnxGraph,
    compare_graph,
    compare_layers,
    graph_inputs,
    tolerance,
)
from hf2mnn.mnn.bundle import DECODER, VISION
from hf2mnn.mnn.convert import read_graph
from hf2mnn.reference.golden import Golden

FLOAT, PHONE = {"precision": "high", "memory": "high"}, {"precision": "low", "memory": "low"}
POINTS = ["m.0.fc", "m.1.fc", "m.2.fc"]
RANDOM = np.random.default_rng(0)
WEIGHTS = {name: RANDOM.normal(size=(8, 8)).astype(np.float32) for name in POINTS}
INPUT = RANDOM.normal(size=(6, 8)).astype(np.float32)


def chain(wrong: str | None = None, by: float = 1.5) -> dict[str, np.ndarray]:
    """Return the values of three linear layers in a row, of which one may be wrong by a factor."""
    values, x = {}, INPUT
    for name, weight in WEIGHTS.items():
        x = np.tanh(x) @ weight * np.float32(by if name == wrong else 1)
        values[name] = x
    return values


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Return a function from MNN's values of a graph of three layers to the rows of the comparison."""
    nodes, x = [], "x"
    for name in POINTS:
        nodes += [helper.make_node("Tanh", [x], [f"{name}/tanh"])]
        nodes += [helper.make_node("MatMul", [f"{name}/tanh", f"{name}.weight.T"], [name])]
        x = name
    stored = [numpy_helper.from_array(weight, f"{name}.weight.T") for name, weight in WEIGHTS.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in ("x", x)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], stored), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    onnx.save(model, tmp_path / "vision.onnx")
    loaded = OnnxGraph.load(tmp_path, "vision")
    # The last layer is an output of the graph and a tap point, both of one name.
    onnx_graph = OnnxGraph(loaded.model, loaded.source, list(dict.fromkeys(loaded.points)))

    def table(mnn: dict[str, np.ndarray], pytorch: dict | None = None, bits: int = 32) -> pd.DataFrame:
        graph = SimpleNamespace(weights=lambda: [SimpleNamespace(name=name, bits=bits) for name in POINTS])
        inputs = GraphInputs("text", "vision", {"x": INPUT}, {"x": INPUT})
        rows = compare_graph(inputs, onnx_graph, pytorch or chain(), mnn, graph, FLOAT, 1)
        return pd.DataFrame(rows).set_index("point")

    return table


def test_equal_values_have_no_error(compare: Callable[..., pd.DataFrame]) -> None:
    rows = compare(chain())
    assert rows.index.tolist() == POINTS
    assert (rows[["onnx_error", "mnn_error", "local_error"]] < 1e-6).all(axis=None)
    assert (rows[["onnx_cosine", "mnn_cosine"]] > 0.999999).all(axis=None)
    assert (rows["local_error"] <= rows["tolerance"]).all()
    assert set(rows["detail"]) == {""}


@pytest.mark.parametrize("wrong", POINTS)
def test_the_local_error_is_at_the_fault_and_the_accumulated_error_from_there_on(
    compare: Callable[..., pd.DataFrame], wrong: str
) -> None:
    rows = compare(chain(wrong))
    assert rows["local_error"][wrong] == pytest.approx(0.5, rel=1e-4)
    assert (rows["local_error"].drop(wrong) < 1e-5).all()
    index = POINTS.index(wrong)
    assert (rows["mnn_error"][:index] < 1e-5).all()
    assert (rows["mnn_error"][index:] > 0.05).all()
    assert (rows["onnx_error"] < 1e-6).all()


def test_a_wrong_onnx_graph_is_distinguished_from_a_wrong_bundle(
    compare: Callable[..., pd.DataFrame],
) -> None:
    rows = compare(chain(), pytorch=chain("m.1.fc"))
    assert rows["onnx_error"].tolist() == pytest.approx(rows["mnn_error"].tolist(), abs=1e-6)
    assert (rows["onnx_error"] > rows["onnx_tolerance"]).tolist() == [False, True, True]
    assert (rows["local_error"] < 1e-5).all()


def test_a_known_fault_has_a_detail(compare: Callable[..., pd.DataFrame]) -> None:
    values = chain()
    values["m.1.fc"] = np.tanh(values["m.0.fc"]) @ WEIGHTS["m.2.fc"]
    values["m.2.fc"] = np.zeros_like(INPUT)
    assert compare(values)["detail"].tolist() == ["", "it has the weights of m.2.fc", "it gives only zeros"]


@pytest.mark.parametrize("wrong", [(), ("m.2.fc",), ("m.1.fc", "m.2.fc")])
def test_no_value_is_computed_twice_in_onnx_runtime(
    compare: Callable[..., pd.DataFrame], monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...]
) -> None:
    """One run computes all values, one all local values; a fault adds a run for each further value that it needs."""
    computed: list[tuple[str, bool]] = []
    run = OnnxGraph.run

    def counted(self: OnnxGraph, inputs: dict, values: list[str], replaced: dict, threads: int) -> dict:
        computed.extend((value, bool(replaced)) for value in values)
        return run(self, inputs, values, replaced, threads)

    monkeypatch.setattr(layers.OnnxGraph, "run", counted)
    values = chain()
    for name in wrong:
        values[name] = np.ones_like(INPUT)
    compare(values)
    further = [(f"{name}/tanh", True) for name in wrong]
    assert computed == [(name, replaced) for replaced in (False, True) for name in POINTS] + further
    assert len(set(computed)) == len(computed)


def test_a_value_that_mnn_does_not_have_is_not_measured_and_hides_no_other(
    compare: Callable[..., pd.DataFrame],
) -> None:
    """A value that is merged away or has another size is replaced by the ONNX graph's own."""
    values = chain("m.1.fc")
    for missing in ({name: values[name] for name in POINTS[1:]}, values | {"m.0.fc": np.zeros((3, 3))}):
        rows = compare(missing)
        assert np.isnan(rows["local_error"]["m.0.fc"])
        assert rows["local_error"]["m.1.fc"] == pytest.approx(0.5, rel=1e-4)
        assert not np.isnan(rows["onnx_error"]["m.0.fc"])


def test_axes_of_size_one_are_no_difference(compare: Callable[..., pd.DataFrame]) -> None:
    rows = compare({name: value[:, None, :, None] for name, value in chain().items()})
    assert (rows["local_error"] < 1e-6).all()


def test_tolerance_follows_the_rounding_error() -> None:
    """A bit more halves it, only linear layers depend on bits, and a wrong operator never passes."""
    assert tolerance(True, 32, FLOAT) == tolerance(False, 4, FLOAT | {"precision": "high"}) / 10 == 1e-4
    assert tolerance(True, 16, FLOAT) == tolerance(True, 32, PHONE | {"memory": "high"}) / 10 == 1e-3
    assert tolerance(True, 4, FLOAT) == pytest.approx(2 * tolerance(True, 5, FLOAT)) == 6 / 16
    assert tolerance(False, 2, PHONE) == 1e-2
    assert tolerance(True, 8, PHONE) == pytest.approx(tolerance(True, 8, FLOAT) + 0.1)
    assert max(tolerance(True, bits, PHONE) for bits in range(2, 9)) <= 0.7


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_tolerance_exceeds_the_error_of_rounding_to_nearest(bits: int) -> None:
    """Weights are Gaussian, in blocks of 64 with scale and zero point."""
    weight = np.random.default_rng(0).normal(size=(256, 4, 64))
    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    rounded = np.rint((weight - low) / step) * step + low
    error = np.linalg.norm(rounded - weight) / np.linalg.norm(weight)
    assert 1.3 * error < tolerance(True, bits, FLOAT)


def facts_of(shapes: Path) -> dict:
    return json.loads((shapes / "onnx" / "model.json").read_text())


def test_a_probe_has_inputs_for_the_graphs_that_it_runs(shapes: Path) -> None:
    """The mask is causal, and MNN gets the same numbers in its own layout."""
    golden = Golden(shapes / "reference" / "evaluation")
    facts = facts_of(shapes)
    inputs = {(run.probe, run.part): run for probe in golden.probes() for run in graph_inputs(probe, golden, facts)}
    assert sorted(inputs) == [("image", "decoder"), ("image", "vision"), ("text", "decoder")]
    for probe in golden.probes():
        run, count = inputs[probe.kind, "decoder"], len(probe.ids)
        mask = run.mnn["attention_mask"][0, 0]
        assert (mask == 0).tolist() == [[column <= row for column in range(count)] for row in range(count)]
        assert list(run.mnn) == ["input_ids", "attention_mask", "position_ids", "logits_index"]
        np.testing.assert_array_equal(run.mnn["input_ids"][:, 0], run.onnx["inputs_embeds"][0])


@pytest.mark.parametrize(("variant", "least", "most"), [("fp32", 0, 1e-4), ("int4", 0.02, 0.475)])
def test_every_tap_point_of_a_right_bundle_is_measured_and_within_tolerance(
    shapes: Path, variant: str, least: float, most: float
) -> None:
    """Linear layers of 4 bits have the error of 4 bits, which shows that they are measured."""
    golden, bundle = Golden(shapes / "reference" / "evaluation"), shapes / "bundles" / variant
    graphs = {"decoder": read_graph(bundle / DECODER), "vision": read_graph(bundle / VISION)}
    table = compare_layers(golden, shapes / "onnx", facts_of(shapes), bundle, graphs, 1, 60)
    assert list(table.columns) == COLUMNS
    for probe in golden.probes():
        assert set(table[table["probe"] == probe.kind]["point"]) == set(probe.tap_points)
    # The converter merges few activations with the layer before, whose values are then missing.
    assert table["local_error"].notna().mean() > 0.95
    measured = table.dropna(subset="local_error")
    assert (measured["local_error"] <= measured["tolerance"]).all()
    assert (table["onnx_error"] < 1e-4).all()
    linear = measured[(measured["operator"] == "linear layer") & (measured["part"] == "decoder")]
    assert linear["local_error"].between(least, most).all()


def test_a_set_without_images_is_compared_too(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, bundle = Golden(shapes / "reference" / "evaluation"), shapes / "bundles" / "fp32"
    text = [probe for probe in golden.probes() if not probe.images]
    monkeypatch.setattr(golden, "probes", lambda: iter(text))
    graphs = {"decoder": read_graph(bundle / "llm.mnn"), "vision": read_graph(bundle / "visual.mnn")}
    frame = compare_layers(golden, shapes / "onnx", facts_of(shapes), bundle, graphs, 1, 60)
    assert set(frame["part"]) == {"decoder"}
    assert len(frame) == frame["point"].nunique() > 50
