"""The comparison layer by layer: accumulated errors tell how far, local ones where."""

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

from hf2mnn.evaluation.layers import COLUMNS, Part, Portable, compare_layers, compare_part, parts_of, tolerance
from hf2mnn.mnn.bundle import DECODER, VISION
from hf2mnn.mnn.convert import read_graph
from hf2mnn.reference.golden import Golden

FLOAT, PHONE = {"precision": "high", "memory": "high"}, {"precision": "low", "memory": "low"}
POINTS = ["m.0.fc", "m.1.fc", "m.2.fc"]
RANDOM = np.random.default_rng(0)
WEIGHTS = {name: RANDOM.normal(size=(8, 8)).astype(np.float32) for name in POINTS}
INPUT = RANDOM.normal(size=(6, 8)).astype(np.float32)


def chain(wrong: str | None = None, by: float = 1.5) -> dict[str, np.ndarray]:
    """Three linear layers in a row, as a runtime computes them that gets one of them wrong."""
    values, x = {}, INPUT
    for name, weight in WEIGHTS.items():
        x = np.tanh(x) @ weight * np.float32(by if name == wrong else 1)
        values[name] = x
    return values


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Rows for what MNN has seen, of a graph of three layers whose weights have some number of bits."""
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
    portable = Portable.load(tmp_path, "vision")
    # The last is an output, and so a point under the name of its module either way.
    portable = Portable(portable.model, portable.source, list(dict.fromkeys(portable.points)))

    def table(seen: dict[str, np.ndarray], truth: dict | None = None, bits: int = 32) -> pd.DataFrame:
        graph = SimpleNamespace(weights=lambda: [SimpleNamespace(name=name, bits=bits) for name in POINTS])
        inputs = Part("text", "vision", {"x": INPUT}, {"x": INPUT})
        return pd.DataFrame(compare_part(inputs, portable, truth or chain(), seen, graph, FLOAT, 1)).set_index("point")

    return table


def test_all_is_well_where_all_is_the_same(compare: Callable[..., pd.DataFrame]) -> None:
    rows = compare(chain())
    assert rows.index.tolist() == POINTS
    assert (rows[["onnx_error", "mnn_error", "mnn_local"]] < 1e-6).all(axis=None)
    assert (rows[["onnx_cosine", "mnn_cosine"]] > 0.999999).all(axis=None)
    assert (rows["mnn_local"] <= rows["tolerance"]).all()
    assert set(rows["looks"]) == {""}


@pytest.mark.parametrize("wrong", POINTS)
def test_the_local_error_is_at_the_fault_alone_and_the_accumulated_from_there_on(
    compare: Callable[..., pd.DataFrame], wrong: str
) -> None:
    rows = compare(chain(wrong))
    assert rows["mnn_local"][wrong] == pytest.approx(0.5, rel=1e-4)
    assert (rows["mnn_local"].drop(wrong) < 1e-5).all()
    place = POINTS.index(wrong)
    assert (rows["mnn_error"][:place] < 1e-5).all()
    assert (rows["mnn_error"][place:] > 0.05).all()
    assert (rows["onnx_error"] < 1e-6).all()


def test_a_graph_that_is_not_pytorchs_is_told_from_a_bundle_that_is_not_the_graphs(
    compare: Callable[..., pd.DataFrame],
) -> None:
    rows = compare(chain(), truth=chain("m.1.fc"))
    assert rows["onnx_error"].tolist() == pytest.approx(rows["mnn_error"].tolist(), abs=1e-6)
    assert (rows["onnx_error"] > rows["onnx_tolerance"]).tolist() == [False, True, True]
    assert (rows["mnn_local"] < 1e-5).all()


def test_a_fault_that_looks_like_something_is_called_so(compare: Callable[..., pd.DataFrame]) -> None:
    seen = chain()
    seen["m.1.fc"] = np.tanh(seen["m.0.fc"]) @ WEIGHTS["m.2.fc"]
    seen["m.2.fc"] = np.zeros_like(INPUT)
    looks = compare(seen)["looks"]
    assert looks.tolist() == ["", "it has the weights of m.2.fc", "it gives only zeros"]


def test_a_value_that_mnn_does_not_have_is_not_measured_and_hides_no_other(
    compare: Callable[..., pd.DataFrame],
) -> None:
    """Fused away, or of another size: the graph's own value takes its place."""
    seen = chain("m.1.fc")
    for missing in ({"m.1.fc": seen["m.1.fc"], "m.2.fc": seen["m.2.fc"]}, seen | {"m.0.fc": np.zeros((3, 3))}):
        rows = compare(missing)
        assert np.isnan(rows["mnn_local"]["m.0.fc"])
        assert rows["mnn_local"]["m.1.fc"] == pytest.approx(0.5, rel=1e-4)
        assert not np.isnan(rows["onnx_error"]["m.0.fc"])


def test_axes_of_size_one_are_no_difference(compare: Callable[..., pd.DataFrame]) -> None:
    rows = compare({name: value[:, None, :, None] for name, value in chain().items()})
    assert (rows["mnn_local"] < 1e-6).all()


def test_tolerance_is_that_of_the_rounding() -> None:
    """Half as much for each bit more; float is float; what is not a linear layer knows no bits; and never so much that
    an operator that is wrong altogether would pass.
    """
    assert tolerance(True, 32, FLOAT) == tolerance(False, 4, FLOAT | {"precision": "high"}) / 10 == 1e-4
    assert tolerance(True, 16, FLOAT) == tolerance(True, 32, PHONE | {"memory": "high"}) / 10 == 1e-3
    assert tolerance(True, 4, FLOAT) == pytest.approx(2 * tolerance(True, 5, FLOAT)) == 6 / 16
    assert tolerance(False, 2, PHONE) == 1e-2
    assert tolerance(True, 8, PHONE) == pytest.approx(tolerance(True, 8, FLOAT) + 0.1)
    assert max(tolerance(True, bits, PHONE) for bits in range(2, 9)) <= 0.7


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_tolerance_lets_rounding_to_nearest_pass_with_room(bits: int) -> None:
    """Gaussian weights in blocks of 64, each with its scale and zero point."""
    weight = np.random.default_rng(0).normal(size=(256, 4, 64))
    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    rounded = np.rint((weight - low) / step) * step + low
    error = np.linalg.norm(rounded - weight) / np.linalg.norm(weight)
    assert 1.3 * error < tolerance(True, bits, FLOAT)


def facts_of(shapes: Path) -> dict:
    return json.loads((shapes / "onnx" / "model.json").read_text())


def test_a_probe_goes_through_the_graphs_that_it_needs(shapes: Path) -> None:
    """No position sees what comes after it, and MNN is fed the same numbers in its own layout."""
    golden = Golden(shapes / "reference")
    found = {
        (part.probe, part.name): part for probe in golden.probes() for part in parts_of(probe, golden, facts_of(shapes))
    }
    assert sorted(found) == [("image", "decoder"), ("image", "vision"), ("text", "decoder")]
    for probe in golden.probes():
        part, count = found[probe.kind, "decoder"], len(probe.ids)
        mask = part.mnn["attention_mask"][0, 0]
        assert (mask == 0).tolist() == [[column <= row for column in range(count)] for row in range(count)]
        assert list(part.mnn) == ["input_ids", "attention_mask", "position_ids", "logits_index"]
        np.testing.assert_array_equal(part.mnn["input_ids"][:, 0], part.onnx["inputs_embeds"][0])


@pytest.mark.parametrize(("variant", "least", "most"), [("fp32", 0, 1e-4), ("int4", 0.02, 0.475)])
def test_every_point_of_a_sound_bundle_is_measured_and_within_tolerance(
    shapes: Path, variant: str, least: float, most: float
) -> None:
    """In both probes; in a linear layer of 4 bits the error is what 4 bits bring, so it is really looked at."""
    golden, bundle = Golden(shapes / "reference"), shapes / "bundles" / variant
    graphs = {"decoder": read_graph(bundle / DECODER), "vision": read_graph(bundle / VISION)}
    table = compare_layers(golden, shapes / "onnx", facts_of(shapes), bundle, graphs, 1, 60)
    assert list(table.columns) == COLUMNS
    for probe in golden.probes():
        assert set(table[table["probe"] == probe.kind]["point"]) == set(probe.points)
    # What follows an activation that the converter has joined with its layer is not to be had; that is little.
    assert table["mnn_local"].notna().mean() > 0.95
    measured = table.dropna(subset="mnn_local")
    assert (measured["mnn_local"] <= measured["tolerance"]).all()
    assert (table["onnx_error"] < 1e-4).all()
    linear = measured[(measured["operator"] == "linear layer") & (measured["part"] == "decoder")]
    assert linear["mnn_local"].between(least, most).all()


def test_a_set_without_images_is_compared_too(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, bundle = Golden(shapes / "reference"), shapes / "bundles" / "fp32"
    text = [probe for probe in golden.probes() if not probe.images]
    monkeypatch.setattr(golden, "probes", lambda: iter(text))
    graphs = {"decoder": read_graph(bundle / "llm.mnn"), "vision": read_graph(bundle / "visual.mnn")}
    frame = compare_layers(golden, shapes / "onnx", facts_of(shapes), bundle, graphs, 1, 60)
    assert set(frame["part"]) == {"decoder"}
    assert len(frame) == frame["point"].nunique() > 50
