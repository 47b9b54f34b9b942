"""Tap points of the exported graphs: each has the name and the value of a module of the transformers model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from exported import Exported
from hf2mnn.families import get_family
from hf2mnn.onnx.session import causal_mask
from hf2mnn.onnx.tap_points import add_outputs, outputs_by_module, replace_with_inputs, select_tap_points
from hf2mnn.reference.golden import MAX_ROWS, as_matrix, evenly_spaced
from hf2mnn.reference.tap_recorder import record_tap_points

GRID = np.array([1, 6, 8])
TOKENS = 11
FIRST = "model.language_model.layers.0"


@dataclass(frozen=True)
class Twin:
    """Model in PyTorch and as graphs.

    Attributes:
        model: Model of transformers.
        folder: Folder of the graphs.
        tap_points: PyTorch's tap points.
        inputs: Inputs of the graphs that give the same values.
    """

    model: Qwen2VLForConditionalGeneration
    folder: Path
    tap_points: dict[str, np.ndarray]
    inputs: dict[str, dict[str, np.ndarray]]

    def graph(self, name: str) -> onnx.ModelProto:
        return onnx.load(self.folder / f"{name}.onnx")

    def values(self, name: str) -> list[str]:
        return select_tap_points([output for node in self.graph(name).graph.node for output in node.output])

    def run(self, name: str, names: list[str], fed: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Return values of a graph in which the tap points of `fed` are replaced by inputs."""
        graph = self.graph(name)
        add_outputs(graph, names)
        new_inputs = replace_with_inputs(graph, list(fed or {}))
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        inputs = self.inputs[name] | {new_inputs[point]: fed[point] for point in new_inputs}
        return dict(zip(names, session.run(names, inputs), strict=True))


@torch.inference_mode()
def make_twin(exported: Exported, folder: Path) -> Twin:
    model = exported.torch
    random, text = np.random.default_rng(0), model.config.text_config
    embeds = random.standard_normal((1, TOKENS, text.hidden_size)).astype(np.float32)
    pixels = random.standard_normal((int(GRID.prod()), 1176)).astype(np.float32)
    positions = np.sort(random.integers(0, 30, (3, TOKENS)), axis=1)
    with record_tap_points(model) as tap_points:
        model.model.visual(torch.from_numpy(pixels), torch.from_numpy(GRID)[None])
        state = model.model.language_model(
            inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions)[:, None], use_cache=False
        )
        model.lm_head(state.last_hidden_state)
    head_dim, kv_heads = text.hidden_size // text.num_attention_heads, text.num_key_value_heads
    inputs = {
        "decoder": {
            "inputs_embeds": embeds,
            "attention_mask": causal_mask(0, TOKENS),
            "position_ids": positions.astype(np.int32),
            "logits_index": np.array([0], np.int32),
            "past_key_values": np.zeros((text.num_hidden_layers, 2, 1, 0, kv_heads, head_dim), np.float32),
        },
        "vision": get_family("qwen2_vl", folder).vision_inputs(pixels, GRID, {"merge_size": 2}),
    }
    # onnx reads no weights through hard links.
    return Twin(model, Path(shutil.copytree(exported.onnx, folder / "copy")), dict(tap_points), inputs)


@pytest.fixture(scope="module", params=["2to1", "1to1"])
def twin(
    request: pytest.FixtureRequest, exports: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Twin:
    """Grouped queries, a tied lm_head and repeated layers; a key for each query and an untied lm_head."""
    return make_twin(exports(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", ["decoder", "vision"])
def test_tap_points_have_the_values_of_their_modules_in_pytorch(twin: Twin, name: str) -> None:
    """Detects a name on the wrong tensor: before a bias, after an activation, key for query."""
    values, graph = twin.values(name), twin.graph(name)
    renamed = outputs_by_module(graph)
    results = twin.run(name, values + list(renamed.values()))
    named = {value: value for value in values} | renamed
    for point, value in named.items():
        rows = as_matrix(results[value])
        np.testing.assert_allclose(
            rows[evenly_spaced(len(rows))], twin.tap_points[point], atol=1e-4, rtol=1e-4, err_msg=point
        )
    assert len({results[value].tobytes() for value in named.values()}) == len(named), "two tap points are one value"


def test_graphs_have_all_tap_points_of_pytorch(twin: Twin) -> None:
    """Every module with a weight, every block, and query, key and context of every attention.

    A vision tower's query and key are outputs of one projection, and are tap points as well.
    """
    names = {
        point for name in ("decoder", "vision") for point in (*twin.values(name), *outputs_by_module(twin.graph(name)))
    }
    assert names == twin.tap_points.keys()
    weighted = {
        name.removesuffix(".weight") for name, _ in twin.model.named_parameters() if name.endswith(".weight")
    } - {"model.language_model.embed_tokens"}
    config = twin.model.config
    layers = {f"model.language_model.layers.{i}" for i in range(config.text_config.num_hidden_layers)}
    blocks = {f"model.visual.blocks.{i}" for i in range(config.vision_config.depth)}
    attentions = {f"{layer}.self_attn" for layer in layers} | {f"{block}.attn" for block in blocks}
    parts = {f"{attention}.{part}" for attention in attentions for part in ("query", "key", "context")}
    assert names == weighted | {"lm_head"} | layers | blocks | parts


def test_tap_points_are_in_the_order_of_computation(twin: Twin) -> None:
    """So the first one out of tolerance is the fault, and not a consequence of it."""
    values = twin.values("decoder")
    parts = ("input_layernorm", "self_attn.q_proj", "self_attn.query", "self_attn.context", "self_attn.o_proj")
    order = [f"{FIRST}.{part}" for part in (*parts, "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj")]
    order += [FIRST, FIRST.replace("0", "1"), "model.language_model.norm"]
    indices = [values.index(point) for point in order]
    assert indices == sorted(indices)


@pytest.mark.parametrize("name", ["decoder", "vision"])
def test_a_graph_with_its_own_values_as_inputs_gives_the_same_output(twin: Twin, name: str) -> None:
    tap_points = twin.values(name)
    whole = twin.run(name, tap_points)
    again = twin.run(name, tap_points, fed=whole)
    for point in tap_points:
        np.testing.assert_allclose(again[point], whole[point], atol=1e-5, rtol=1e-5, err_msg=point)


def test_another_value_at_one_tap_point_changes_the_next_ones_only(twin: Twin) -> None:
    """So the fault of one operator shows at that operator alone, however many follow it."""
    tap_points = twin.values("decoder")
    whole = twin.run("decoder", tap_points)

    def changed(point: str) -> list[str]:
        again = twin.run("decoder", tap_points, fed=whole | {point: whole[point][..., ::-1].copy()})
        return [other for other in tap_points if not np.allclose(again[other], whole[other], atol=1e-4)]

    attention, mlp = f"{FIRST}.self_attn", f"{FIRST}.mlp"
    assert changed(f"{attention}.q_proj") == [f"{attention}.query"]
    assert changed(f"{attention}.key") == [f"{attention}.context"]
    assert changed(f"{mlp}.gate_proj") == [f"{mlp}.down_proj"]
    assert sorted(changed(f"{FIRST}.input_layernorm")) == [f"{attention}.{part}_proj" for part in "kqv"]
    # The output of a block goes to the next normalization, and past the whole next block.
    following = FIRST.replace("0", "1")
    assert changed(FIRST)[0] == f"{following}.input_layernorm"
    assert not any(name.startswith(f"{FIRST}.") for name in changed(FIRST))


def test_outputs_are_added_after_the_present_ones_and_none_twice(twin: Twin) -> None:
    graph = twin.graph("decoder")
    before = [value.name for value in graph.graph.output]
    add_outputs(graph, [FIRST, *before])
    assert [value.name for value in graph.graph.output] == [*before, FIRST]


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("model.layers.0.mlp", True),
        ("lm_head", False),  # exporters use single words for any value
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
def test_parameters_and_other_names_are_no_tap_points(name: str, point: bool) -> None:
    assert select_tap_points([name]) == [name] * point


@pytest.mark.parametrize("count", [1, 2, MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1, 1000])
def test_evenly_spaced_rows_have_the_first_and_the_last(count: int) -> None:
    rows = evenly_spaced(count)
    assert len(rows) == min(count, MAX_ROWS)
    assert (rows[0], rows[-1]) == (0, count - 1)
    gaps = np.diff(rows)
    assert not len(gaps) or gaps.min() >= max(1, gaps.max() - 1)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 5, 8), (5, 8)), ((1, 5, 2, 4), (5, 8)), ((5, 2, 4), (5, 8)), ((5, 8), (5, 8)), ((1, 8), (1, 8))],
)
def test_rows_are_tokens_whatever_axes_a_value_has(shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    value = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(as_matrix(value), value.reshape(rows))
