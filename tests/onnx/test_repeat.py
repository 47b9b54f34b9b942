"""A layer that is repeated in the graph must be the layer that would have been traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hf2mnn.onnx import repeat
from hf2mnn.onnx import trace as tracing
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.onnx.tap_points import points_of
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint
from support import TEXT, VISION

LAYERS, BLOCKS = 6, 5


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = make_checkpoint(
        text=TEXT | {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS},
        vision=VISION | {"depth": BLOCKS},
    )
    return fetch_checkpoint(tmp_path_factory.mktemp("deep") / "source", checkpoint)


@pytest.fixture(scope="module")
def repeated(source: Path) -> Path:
    """Not one layer more than three is traced."""
    with pytest.MonkeyPatch.context() as patch:
        held = []
        trace = tracing._trace
        patch.setattr(tracing, "_trace", lambda *given: held.append(trace(*given)) or held[-1])
        folder = export_onnx(source, source.parent / "repeated")
    assert len(held) == 2  # decoder and vision tower, none a second time
    return folder


@pytest.fixture(scope="module")
def traced(source: Path) -> Path:
    """Every layer traced, as a model whose layers differ is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "layers_of", lambda _: None)
        return export_onnx(source, source.parent / "traced")


def test_both_graphs_have_the_same_operators_points_inputs_and_outputs(repeated: Path, traced: Path) -> None:
    for name in ("decoder.onnx", "vision.onnx"):
        one, other = (onnx.load(folder / name, load_external_data=False).graph for folder in (repeated, traced))
        kinds = [sorted(node.op_type for node in graph.node) for graph in (one, other)]
        assert kinds[0] == kinds[1]
        points = [points_of([name for node in graph.node for name in node.output]) for graph in (one, other)]
        assert points[0] == points[1]
        for values in ("input", "output"):
            sides = [[(value.name, str(value.type)) for value in getattr(graph, values)] for graph in (one, other)]
            assert sides[0] == sides[1]
        weights = [{tensor.name: list(tensor.dims) for tensor in graph.initializer} for graph in (one, other)]
        assert {key: dims for key, dims in weights[0].items() if "layers." in key or "blocks." in key} == {
            key: dims for key, dims in weights[1].items() if "layers." in key or "blocks." in key
        }


def test_both_graphs_compute_the_same(repeated: Path, traced: Path) -> None:
    answers = []
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 200, 12)
    patches, grid = rng.standard_normal((24, 1176), np.float32), np.array([1, 4, 6])
    for folder in (repeated, traced):
        model = OnnxModel(folder)
        cache = model.new_cache()
        first = model.prefill(cache, ids[:7], all_logits=True)
        second = model.prefill(cache, ids[7:], all_logits=True)
        answers.append([first, second, cache.past, *model.see((patches, grid))])
    for one, other in zip(*answers, strict=True):
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


def test_layers_are_repeated_only_where_all_are_alike() -> None:
    name, layers = repeat.layers_of(_Part([8] * 5))
    assert (name, len(layers)) == ("layers", 5)
    assert repeat.layers_of(_Part([8, 8, 8, 8, 16])) is None
    odd = _Part([8] * 5)
    odd.layers[3].sliding_window = 128
    assert repeat.layers_of(odd) is None


def test_as_many_layers_as_are_traced_are_not_repeated() -> None:
    assert repeat.layers_of(_Part([8] * repeat.TRACED)) is None
