"""Recorded tap points of PyTorch: values, probes, and no change of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from hf2mnn.reference.golden import MAX_ROWS, Golden, GoldenProbe
from hf2mnn.reference.tap_recorder import record_tap_points
from hf2mnn.stages.fetch import run as fetch_checkpoint
from hf2mnn.stages.reference import run as run_reference

TEXT = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"mrope_section": [4, 6, 6], "rope_theta": 10000.0, "rope_type": "default"},
}
NORM, ATTENTION = "model.language_model.norm", "model.language_model.layers.0.self_attn"
IMAGE = 561


def user(*images: str, text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": name} for name in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


EXAMPLES = {
    "long": user(text="How many things are there, and which of them is at the bottom left?"),
    "short": user(text="Why?"),
    "same": user(text="Why?"),
    "two": user("a.png", "a.png", text="?"),
    "imaged": user("a.png", text="Which?"),
    "wordy": user("a.png", text="Which thing is this, and what is it there for?"),
}


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(text=TEXT, vision={"depth": 1, "embed_dim": 96, "num_heads": 3})


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def write_set(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"id": name, "messages": EXAMPLES[name]}) for name in names]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    noise = np.random.default_rng(0).integers(0, 256, (84, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def golden(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = tmp_path_factory.mktemp("probes")
    source = fetch_checkpoint(folder / "checkpoint", checkpoint)
    return Golden(run_reference(source, write_set(folder / "set", list(EXAMPLES)), folder / "reference", 6, threads=1))


@pytest.fixture(scope="module")
def probes(golden: Golden) -> dict[str, GoldenProbe]:
    return {probe.kind: probe for probe in golden.probes()}


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: int = 5) -> torch.Tensor:
    return model(input_ids=torch.arange(tokens)[None] + 10).logits


def hooks(model: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def implementations(model: torch.nn.Module) -> list[str]:
    return [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]


def test_recording_changes_nothing_while_it_runs_or_after(model: torch.nn.Module) -> None:
    before, implementation = logits(model), implementations(model)
    with record_tap_points(model) as tap_points:
        during = logits(model)
        assert hooks(model) > 0
    count = len(tap_points)
    after = logits(model)
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert implementations(model) == implementation
    assert hooks(model) == 0
    assert len(tap_points) == count > 0


def test_an_error_inside_restores_the_model(model: torch.nn.Module) -> None:
    implementation = implementations(model)
    with pytest.raises(RuntimeError, match="inside"), record_tap_points(model):
        raise RuntimeError("inside")
    assert implementations(model) == implementation
    assert hooks(model) == 0


def test_a_tap_point_is_the_output_of_its_module(model: torch.nn.Module) -> None:
    """Against an independent hook, and the context computed from query, key and value."""
    kept: dict[str, torch.Tensor] = {}
    hook = model.get_submodule(NORM).register_forward_hook(lambda _, __, output: kept.update(norm=output))
    with record_tap_points(model) as tap_points:
        logits(model)
    hook.remove()
    np.testing.assert_array_equal(tap_points[NORM], kept["norm"][0].numpy())
    query, key = (tap_points[f"{ATTENTION}.{part}"].reshape(5, -1, 32) for part in ("query", "key"))
    assert (query.shape[1], key.shape[1]) == (4, 2)
    value = tap_points[f"{ATTENTION}.v_proj"].reshape(5, 2, 32)
    scores = np.einsum("qhd,khd->hqk", query, key.repeat(2, axis=1)) / np.sqrt(32)
    scores[:, np.triu_indices(5, 1)[0], np.triu_indices(5, 1)[1]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = np.einsum("hqk,khd->qhd", weights, value.repeat(2, axis=1)).reshape(5, -1)
    np.testing.assert_allclose(tap_points[f"{ATTENTION}.context"], context, atol=1e-5)


def test_of_many_rows_a_sample_with_the_first_and_the_last_is_stored(model: torch.nn.Module) -> None:
    """A real image has thousands of rows; each stored row is complete."""
    with record_tap_points(model) as tap_points:
        whole = logits(model, tokens=300)[0].numpy()
    assert tap_points["lm_head"].shape == (MAX_ROWS, whole.shape[1])
    np.testing.assert_array_equal(tap_points["lm_head"][0], whole[0])
    np.testing.assert_array_equal(tap_points["lm_head"][-1], whole[-1])
    assert tap_points[f"{ATTENTION}.query"].shape == (MAX_ROWS, 128)


def test_probes_are_the_shortest_examples_with_the_fewest_images(probes: dict[str, GoldenProbe]) -> None:
    """One image before two, and the first by name of two of equal length."""
    assert {kind: probe.id for kind, probe in probes.items()} == {"text": "same", "image": "imaged"}
    assert probes["image"].images == ["a.png"]


def test_a_set_without_images_has_one_probe(checkpoint: Path, tmp_path: Path) -> None:
    source = fetch_checkpoint(tmp_path / "checkpoint", checkpoint)
    reference = run_reference(source, write_set(tmp_path / "set", ["short"]), tmp_path / "reference", 3, threads=1)
    assert [probe.kind for probe in Golden(reference).probes()] == ["text"]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_probe_is_one_call_on_prompt_and_answer(golden: Golden, probes: dict[str, GoldenProbe], kind: str) -> None:
    """Its logits are those of the answer that was decoded step by step; the last token is left out."""
    probe = probes[kind]
    (example,) = [example for example in golden.examples() if example.id == probe.id]
    prompt = len(example.input_ids)
    assert probe.ids.tolist() == [*example.input_ids, *example.answer_ids[:-1]]
    assert probe.inputs_embeds.shape == (len(probe.ids), 128)
    np.testing.assert_array_equal(probe.position_ids[:, :prompt], example.position_ids)
    after = example.position_ids.max() + 1 + np.arange(len(example.answer_ids) - 1)
    np.testing.assert_array_equal(probe.position_ids[:, prompt:], np.tile(after, (3, 1)))
    np.testing.assert_allclose(probe.tap_points["lm_head"][-1], example.logits[-1], atol=1e-4)


def test_the_embeddings_of_a_probe_hold_the_image(golden: Golden, probes: dict[str, GoldenProbe]) -> None:
    probe = probes["image"]
    embeds = golden.image("a.png").embeds
    np.testing.assert_allclose(probe.inputs_embeds[probe.ids == IMAGE], embeds, atol=1e-5)
    assert "model.visual.blocks.0" in probe.tap_points
    assert not any(point.startswith("model.visual") for point in probes["text"].tap_points)


def test_a_probe_is_split_after_its_last_image() -> None:
    def split(*ids: int) -> tuple[list[int], list[int]]:
        probe = GoldenProbe("image", "x", [], np.array(ids), np.zeros(0), np.zeros(0), {})
        return probe.split_after_images(IMAGE)

    assert split(1, 2, 3) == ([], [1, 2, 3])
    assert split(1, IMAGE, IMAGE, 2, 3) == ([1, IMAGE, IMAGE], [2, 3])
    assert split(IMAGE, 1, IMAGE, 2) == ([IMAGE, 1, IMAGE], [2])
