"""Points of the exported graphs: each is a module of the transformers model by name, and holds what that computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from hf2mnn.families import family_named
from hf2mnn.onnx.tap_points import cut, expose, outputs_by_module, points_of
from hf2mnn.reference.tap_points import ROWS, as_rows, kept_rows
from hf2mnn.reference.tap_recorder import recorded
from hf2mnn.stages.export import run as export_onnx
from hf2mnn.stages.fetch import run as fetch_checkpoint

ROPE = {"rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 10000.0, "rope_type": "default"}}
LAYERS = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, **ROPE}
SIZES = {"hidden_size": 128, "intermediate_size": 208, "num_attention_heads": 4}
# Grouped queries and an lm_head that is the embedding; a key for each query and an lm_head of its own.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"text": {**LAYERS, **SIZES, "num_key_value_heads": 2}, "tied": True},
    "single": {"text": {**LAYERS, **SIZES, "num_key_value_heads": 4}, "tied": False},
}
GRID = np.array([1, 6, 8])
TOKENS = 11
FIRST = "model.language_model.layers.0"


@dataclass(frozen=True)
class Twin:
    """One model in PyTorch and as graphs, and both on the same input: PyTorch's points, and the graphs' inputs."""

    model: Qwen2VLForConditionalGeneration
    folder: Path
    points: dict[str, np.ndarray]
    inputs: dict[str, dict[str, np.ndarray]]

    def graph(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.folder / f"{name}.onnx")

    def values(self, name: str) -> list[str]:
        return points_of([output for node in self.graph(name).graph.node for output in node.output])

    def run(self, name: str, wanted: list[str], fed: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """`wanted` values of a graph, cut where `fed` has something."""
        graph = self.graph(name)
        expose(graph, wanted)
        given = cut(graph, list(fed or {}))
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        inputs = self.inputs[name] | {given[point]: fed[point] for point in given}
        return dict(zip(wanted, session.run(wanted, inputs), strict=True))


@torch.inference_mode()
def make_twin(checkpoint: Path, folder: Path) -> Twin:
    exported = export_onnx(fetch_checkpoint(folder / "checkpoint", checkpoint), folder / "onnx")
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    random, text = np.random.default_rng(0), model.config.text_config
    embeds = random.standard_normal((1, TOKENS, text.hidden_size)).astype(np.float32)
    pixels = random.standard_normal((int(GRID.prod()), 1176)).astype(np.float32)
    positions = np.sort(random.integers(0, 30, (3, TOKENS)), axis=1)
    with recorded(model) as points:
        model.model.visual(torch.from_numpy(pixels), torch.from_numpy(GRID)[None])
        state = model.model.language_model(
            inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions)[:, None], use_cache=False
        )
        model.lm_head(state.last_hidden_state)
    size, heads = text.hidden_size // text.num_attention_heads, text.num_key_value_heads
    future = np.triu(np.full((1, 1, TOKENS, TOKENS), np.finfo(np.float32).min, np.float32), 1)
    inputs = {
        "decoder": {
            "inputs_embeds": embeds,
            "attention_mask": future,
            "position_ids": positions.astype(np.int32),
            "logits_index": np.array([0], np.int32),
            "past_key_values": np.zeros((2, 2, 1, 0, heads, size), np.float32),
        },
        "vision": family_named("qwen2_vl", folder).vision_inputs(pixels, GRID, {"merge_size": 2}),
    }
    # onnx reads no weights through hard links.
    return Twin(model, Path(shutil.copytree(exported, folder / "copy")), dict(points), inputs)


@pytest.fixture(scope="module", params=SHAPES)
def twin(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Twin:
    vision = {"depth": 2, "embed_dim": 96, "num_heads": 3}
    checkpoint = make_checkpoint(**SHAPES[request.param], vision=vision)
    return make_twin(checkpoint, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", ["decoder", "vision"])
def test_every_point_is_what_its_module_gives_in_pytorch(twin: Twin, name: str) -> None:
    """By value, so that a name on the wrong tensor (before a bias, after an activation, key for query) is seen."""
    values, graph = twin.values(name), twin.graph(name)
    outside = outputs_by_module(graph)
    found = twin.run(name, values + list(outside.values()))
    named = {value: value for value in values} | outside
    for point, value in named.items():
        rows = as_rows(found[value])
        np.testing.assert_allclose(rows[kept_rows(len(rows))], twin.points[point], atol=1e-4, rtol=1e-4, err_msg=point)
    assert len({found[value].tobytes() for value in named.values()}) == len(named), "two points are one value"


def test_no_point_of_pytorch_is_missing_in_the_graphs(twin: Twin) -> None:
    """Every module with a weight, every block, and query, key and context of every attention of the decoder; a vision
    tower's query and key come out of one projection, and are points as well.
    """
    found = {
        point for name in ("decoder", "vision") for point in (*twin.values(name), *outputs_by_module(twin.graph(name)))
    }
    assert found == twin.points.keys()
    weighted = {
        name.removesuffix(".weight") for name, _ in twin.model.named_parameters() if name.endswith(".weight")
    } - {"model.language_model.embed_tokens"}
    blocks = {f"model.language_model.layers.{i}" for i in (0, 1)} | {f"model.visual.blocks.{i}" for i in (0, 1)}
    attentions = {f"model.language_model.layers.{i}.self_attn" for i in (0, 1)}
    attentions |= {f"model.visual.blocks.{i}.attn" for i in (0, 1)}
    inside = {f"{attention}.{part}" for attention in attentions for part in ("query", "key", "context")}
    assert found == weighted | {"lm_head"} | blocks | inside


def test_points_come_in_the_order_of_computation(twin: Twin) -> None:
    """The first point out of tolerance is then the fault, and not what follows from it."""
    values = twin.values("decoder")
    parts = ("input_layernorm", "self_attn.q_proj", "self_attn.query", "self_attn.context", "self_attn.o_proj")
    order = [f"{FIRST}.{part}" for part in (*parts, "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj")]
    order += [FIRST, FIRST.replace("0", "1"), "model.language_model.norm"]
    places = [values.index(point) for point in order]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["decoder", "vision"])
def test_a_graph_that_is_cut_and_fed_its_own_values_computes_the_same(twin: Twin, name: str) -> None:
    points = twin.values(name)
    whole = twin.run(name, points)
    again = twin.run(name, points, fed=whole)
    for point in points:
        np.testing.assert_allclose(again[point], whole[point], atol=1e-5, rtol=1e-5, err_msg=point)


def test_another_value_at_one_point_changes_what_reads_it_and_nothing_else(twin: Twin) -> None:
    """So the fault of one operator shows at that operator alone, however deep the graph goes on behind it."""
    points = twin.values("decoder")
    whole = twin.run("decoder", points)

    def changed(point: str) -> list[str]:
        again = twin.run("decoder", points, fed=whole | {point: whole[point][..., ::-1].copy()})
        return [other for other in points if not np.allclose(again[other], whole[other], atol=1e-4)]

    attention, mlp = f"{FIRST}.self_attn", f"{FIRST}.mlp"
    assert changed(f"{attention}.q_proj") == [f"{attention}.query"]
    assert changed(f"{attention}.key") == [f"{attention}.context"]
    assert changed(f"{mlp}.gate_proj") == [f"{mlp}.down_proj"]
    assert sorted(changed(f"{FIRST}.input_layernorm")) == [f"{attention}.{part}_proj" for part in "kqv"]
    # A block is read by the norm after it, and goes past all of the next one.
    following = FIRST.replace("0", "1")
    assert changed(FIRST)[0] == f"{following}.input_layernorm"
    assert not any(name.startswith(f"{FIRST}.") for name in changed(FIRST))


def test_an_exposed_graph_is_the_same_graph(twin: Twin) -> None:
    """Outputs are added behind those that are there, none twice."""
    graph = twin.graph("decoder")
    before = [value.name for value in graph.graph.output]
    expose(graph, [FIRST, *before])
    assert [value.name for value in graph.graph.output] == [*before, FIRST]


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("model.layers.0.mlp", True),
        ("lm_head", False),  # one word is any exporter's name for anything
        ("logits", False),
        ("a.weight", False),
        ("a.bias", False),
        ("a.weight.T", False),
        ("rotary_emb.inv_freq", False),
        ("attention_0/context", False),
        ("a..b", False),
        ("", False),
        ("0.a", False),
    ],
)
def test_points_are_told_from_parameters_and_other_names(name: str, point: bool) -> None:
    assert points_of([name]) == [name] * point


@pytest.mark.parametrize("count", [1, 2, ROWS - 1, ROWS, ROWS + 1, 1000])
def test_kept_rows_are_few_and_spread_from_the_first_to_the_last(count: int) -> None:
    rows = kept_rows(count)
    assert len(rows) == min(count, ROWS)
    assert (rows[0], rows[-1]) == (0, count - 1)
    gaps = np.diff(rows)
    assert not len(gaps) or gaps.min() >= max(1, gaps.max() - 1)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 5, 8), (5, 8)), ((1, 5, 2, 4), (5, 8)), ((5, 2, 4), (5, 8)), ((5, 8), (5, 8)), ((1, 8), (1, 8))],
)
def test_rows_are_tokens_whatever_axes_a_value_has(shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    value = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(as_rows(value), value.reshape(rows))
