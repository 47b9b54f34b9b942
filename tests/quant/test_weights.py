"""Weights of a .mnn model by operator: any rows of any format, and errors for a file of another graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf2mnn.core.errors import ConversionError, QuantizationError
from hf2mnn.mnn.graph import Graph
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.weights import WeightFile, operators
from one_layer import Model, convert, quantize

OUTPUTS, INPUTS = 29, 64
FORMATS = {
    "float": WeightFormat(),
    "half": WeightFormat(16),
    "int3": WeightFormat(3, 32, method="mse"),
    "int8": WeightFormat(8, 0, True, 32, "mse"),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal((OUTPUTS, INPUTS)).astype(np.float32) for name in FORMATS}


@pytest.fixture(scope="module")
def model(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One layer of each format in one file, which tests only read."""
    folder = tmp_path_factory.mktemp("model")
    return quantize(convert(folder, weights), folder / "quantized", FORMATS)


def test_any_rows_can_be_read(model: Model, weights: dict[str, np.ndarray]) -> None:
    for name, operator in model.by_name.items():
        whole = model.weights.rows(operator)
        assert whole.shape == (OUTPUTS, INPUTS) and whole.dtype == np.float32
        for begin, end in ((0, OUTPUTS), (3, 17), (OUTPUTS - 1, OUTPUTS), (5, 5)):
            assert np.array_equal(model.weights.rows(operator, begin, end), whole[begin:end]), name
        assert np.array_equal(model.weights.rows(operator, 8), whole[8:]), name
    assert np.array_equal(model.weights.rows(model.by_name["float"]), weights["float"])
    halves = weights["half"].astype(np.float16).astype(np.float32)
    assert np.array_equal(model.weights.rows(model.by_name["half"]), halves)


def test_parts_fill_the_file(model: Model) -> None:
    """Without gaps or overlaps."""
    ends = 0
    for operator in sorted(model.layers, key=lambda operator: operator.parts[0]):
        for offset, size in operator.parts:
            assert offset == ends
            ends += size
    assert ends == model.weights.path.stat().st_size == model.graph.external_size()


@pytest.mark.parametrize("missing", [1, 1000, None])
def test_a_file_that_is_too_short_is_refused(model: Model, tmp_path: Path, missing: int | None) -> None:
    """Or is missing. The engine would read zeros or uninitialized memory."""
    path = tmp_path / "cut.mnn.weight"
    if missing:
        path.write_bytes(model.weights.path.read_bytes()[:-missing])
    with pytest.raises(ConversionError, match=r"^cut\.mnn\.weight has \d+ bytes, but the graph reads \d+"):
        WeightFile(model.graph, path)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("int3", lambda main: main["quanParameter"].update(type=5), "weights of type 5 are not supported"),
        ("int3", lambda main: main["quanParameter"].update(type=2), "are not 1856 quantized weights"),
        ("int3", lambda main: main["quanParameter"].update(type=4), "are not 1856 quantized weights"),
        ("int3", lambda main: main["quanParameter"].update(shapeInt32=True), "are not 1856 quantized weights"),
        ("int3", lambda main: main["common"].update(outputCount=28), "are not 1792 quantized weights"),
        ("int8", lambda main: main["external"].__setitem__(1, 1000), "its 1000 bytes in the weight file"),
        ("int3", lambda main: main["external"].__setitem__(2, 2 * 2 * 29 * 2 - 2), "scales do not fit 29 rows"),
        ("int3", lambda main: main["external"].__setitem__(2, 0), "0 scales do not fit 29 rows"),
        ("int3", lambda main: main["external"].__setitem__(2, 1), "0 scales do not fit 29 rows"),
        ("int8", lambda main: main["external"].__setitem__(2, 4 * 28), "28 scales do not fit 29 rows"),
        ("int8", lambda main: main["external"].__setitem__(2, 4 * 29 * 5), "145 scales do not fit 29 rows"),
        ("half", lambda main: main["external"].__setitem__(1, 100), "100 bytes are not 1856 weights"),
        ("float", lambda main: main["external"].__setitem__(1, 100), "100 bytes are not 1856 weights"),
        ("int3", lambda main: main["external"].__setitem__(0, 3), "are not 1856 quantized weights"),
    ],
)
def test_a_graph_of_another_file_is_refused(model: Model, layer: str, change: Change, message: str) -> None:
    """With the name of the operator."""
    graph = Graph(copy.deepcopy(model.graph.content))
    index = [operator.name for operator in model.layers].index(layer)
    change(graph.of_type("Convolution")[index]["main"])
    with pytest.raises(QuantizationError, match=rf"^{layer}: .*{message}"):
        model.weights.rows(operators(graph)[index])


def test_weights_inside_the_graph_are_refused(model: Model) -> None:
    """A converter without --saveExternalData writes them."""
    graph = Graph(copy.deepcopy(model.graph.content))
    del graph.of_type("Convolution")[0]["main"]["external"]
    with pytest.raises(QuantizationError, match=r"^\w+: .*inside the graph.*--saveExternalData"):
        operators(graph)
