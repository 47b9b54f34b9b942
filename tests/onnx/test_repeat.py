"""A graph with copied layers equals the graph with all layers traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exported import Exported
from hf2mnn.onnx import repeat, trace
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.onnx.tap_points import select_tap_points
from hf2mnn.stages.export import run as export_onnx


@pytest.fixture(scope="module")
def repeated(exports: Callable[[str], Exported]) -> Path:
    """Graphs of which three layers are traced and copied."""
    return exports("2to1").onnx


@pytest.fixture(scope="module")
def traced(exports: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of which every layer is traced, as for a model whose layers differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "identical_layers", lambda _: None)
        return export_onnx(exports("2to1").source, tmp_path_factory.mktemp("traced") / "onnx")


def test_both_graphs_have_the_same_operators_tap_points_inputs_and_outputs(repeated: Path, traced: Path) -> None:
    for name in ("decoder.onnx", "vision.onnx"):
        one, other = (onnx.load(folder / name, load_external_data=False).graph for folder in (repeated, traced))
        kinds = [sorted(node.op_type for node in graph.node) for graph in (one, other)]
        assert kinds[0] == kinds[1]
        tap_points = [
            select_tap_points([name for node in graph.node for name in node.output]) for graph in (one, other)
        ]
        assert tap_points[0] == tap_points[1]
        for values in ("input", "output"):
            sides = [[(value.name, str(value.type)) for value in getattr(graph, values)] for graph in (one, other)]
            assert sides[0] == sides[1]
        weights = [{tensor.name: list(tensor.dims) for tensor in graph.initializer} for graph in (one, other)]
        assert {key: dims for key, dims in weights[0].items() if "layers." in key or "blocks." in key} == {
            key: dims for key, dims in weights[1].items() if "layers." in key or "blocks." in key
        }


def test_both_graphs_give_the_same_output(repeated: Path, traced: Path) -> None:
    outputs = []
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 200, 12)
    patches, grid = rng.standard_normal((24, 1176), np.float32), np.array([1, 4, 6])
    for folder in (repeated, traced):
        model = OnnxModel(folder)
        cache = model.new_cache()
        first = model.prefill(cache, ids[:7], all_logits=True)
        second = model.prefill(cache, ids[7:], all_logits=True)
        outputs.append([first, second, cache.past, *model.embed_image((patches, grid))])
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


class _Block(torch.nn.Module):
    def __init__(self, width: int, index: int) -> None:
        super().__init__()
        self.linear, self.layer_idx = torch.nn.Linear(width, width), index


class _Part(torch.nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Identity()] * 2)
        self.layers = torch.nn.ModuleList([_Block(width, index) for index, width in enumerate(widths)])


def test_layers_are_repeated_only_if_all_are_identical() -> None:
    name, layers = repeat.identical_layers(_Part([8] * 5))
    assert (name, len(layers)) == ("layers", 5)
    assert repeat.identical_layers(_Part([8, 8, 8, 8, 16])) is None
    odd = _Part([8] * 5)
    odd.layers[3].sliding_window = 128
    assert repeat.identical_layers(odd) is None


def test_three_layers_are_not_repeated() -> None:
    assert repeat.identical_layers(_Part([8] * repeat.TRACED)) is None
