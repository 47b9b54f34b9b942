"""What is said of Qwen2-VL in numpy against transformers, which is the one to be equal to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_position_ids

from hf2mnn.errors import SourceError
from hf2mnn.families import FAMILIES, family_named
from support import SHAPES_VL

FAMILY = FAMILIES["qwen2_vl"]
CONFIG = json.loads((SHAPES_VL / "config.json").read_text())
IMAGE, MERGE = CONFIG["image_token_id"], 2
TEXT_TOKEN = 7

sides = st.integers(1, 9).map(lambda merged: merged * MERGE)
grids = st.tuples(st.just(1), sides, sides)
texts = st.integers(1, 20)


@pytest.fixture(scope="module")
def model() -> Qwen2VLForConditionalGeneration:
    """The real class without memory: only its configuration and its arithmetic on positions are used."""
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(SHAPES_VL))


def prompt(parts: list[int | tuple[int, int, int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids of texts (a number of tokens each) and pictures (a grid each), and the grids."""
    pictures = [np.array(part) for part in parts if isinstance(part, tuple)]
    runs = [
        [IMAGE] * (part[1] * part[2] // MERGE**2) if isinstance(part, tuple) else [TEXT_TOKEN] * part for part in parts
    ]
    return np.concatenate([np.array(run, np.int64) for run in runs]), pictures


def interleave(pictures: list[tuple[int, int, int]], between: list[int], head: int, tail: int) -> list[Any]:
    """Pictures with text between any two; the template always puts vision_end and vision_start there."""
    parts: list[Any] = [head] if head else []
    for index, grid in enumerate(pictures):
        parts += [grid] if index == 0 else [between[index % len(between)], grid]
    return [*parts, tail] if tail else parts


@given(
    pictures=st.lists(grids, min_size=1, max_size=4),
    between=st.lists(texts, min_size=1, max_size=3),
    head=st.integers(0, 20),
    tail=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_positions_are_those_of_transformers(
    model: Qwen2VLForConditionalGeneration, pictures: list, between: list[int], head: int, tail: int
) -> None:
    """A wrong position after a picture leaves the first words right and the rest subtly wrong."""
    ids, found = prompt(interleave(pictures, between, head, tail))
    kinds = torch.from_numpy(ids == IMAGE).int()[None]
    theirs, _ = model.model.get_rope_index(torch.from_numpy(ids)[None], kinds, torch.from_numpy(np.stack(found)))
    ours = FAMILY.position_ids(ids, found, IMAGE, MERGE)
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


@given(length=st.integers(1, 300))
@settings(max_examples=10, deadline=None)
def test_text_alone_counts_on_in_all_rows(length: int) -> None:
    ids, _ = prompt([length])
    np.testing.assert_array_equal(FAMILY.position_ids(ids, [], IMAGE, MERGE), np.tile(np.arange(length), (3, 1)))


@given(height=sides, width=sides, frames=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_patches_are_placed_as_in_transformers(height: int, width: int, frames: int) -> None:
    """Patches come in merged squares, not row by row; rows taken for columns would only show on odd pictures."""
    grid = np.array([frames, height, width])
    pixels = np.zeros((int(grid.prod()), 4), np.float64)
    inputs = FAMILY.vision_inputs(pixels, grid, MERGE)
    theirs = get_vision_position_ids(torch.from_numpy(grid)[None], MERGE)
    np.testing.assert_array_equal(inputs["position_ids"], theirs.numpy().T)
    assert [inputs[name].dtype for name in ("patches", "position_ids", "attention_mask")] == ["f4", "i4", "f4"]
    # transformers cuts attention at cu_seqlens, one length a frame.
    frame = np.repeat(np.arange(frames), height * width)
    np.testing.assert_array_equal(inputs["attention_mask"][0] == 0, frame[:, None] == frame[None, :])


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    bounds=st.sampled_from([(3136, 200704), (3136, 12845056), (65536, 65536), (200000, 262144)]),
)
@example(width=1000, height=10, bounds=(3136, 200704))
@settings(max_examples=400, deadline=None)
def test_pictures_are_resized_to_the_size_that_transformers_makes(
    width: int, height: int, bounds: tuple[int, int]
) -> None:
    """Another size is another number of image tokens: the engine would see another picture than PyTorch.

    A side under half a merged patch is the odd case: transformers rounds it to 0, and so takes the picture for one
    that is too small.
    """
    assume(max(width, height) <= 200 * min(width, height))  # the processor refuses others
    low, high = bounds
    model = {"patch_size": 14, "merge_size": MERGE, "min_pixels": low, "max_pixels": high}
    rows, columns = smart_resize(height, width, 28, low, high)
    assert FAMILY.picture_size(width, height, model) == (columns, rows)


@pytest.mark.parametrize(
    ("parameter", "older"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.visual.merger.mlp.2.bias", "visual.merger.mlp.2.bias"),
    ],
)
def test_weights_are_found_under_both_names(parameter: str, older: str) -> None:
    """The hub's checkpoints have the older names."""
    assert FAMILY.tensor_names(parameter, tied=True) == [parameter, older]


def test_every_parameter_of_the_model_has_a_name_in_a_saved_checkpoint(model: Qwen2VLForConditionalGeneration) -> None:
    """No weight of the real class is out of reach, and no two are read from the same tensor."""
    names = [name for name, _ in model.named_parameters()]
    older = [FAMILY.tensor_names(name, tied=False)[-1] for name in names]
    assert len(set(older)) == len(names) > 30
    assert all(name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "visual.")) for name in older)


def test_a_tied_lm_head_is_the_embedding_and_an_untied_one_never_is() -> None:
    """An untied checkpoint without lm_head must be refused, not answered with the embedding."""
    embedding = FAMILY.tensor_names("model.language_model.embed_tokens.weight", tied=True)
    assert FAMILY.tensor_names("lm_head.weight", tied=True) == embedding
    assert FAMILY.tensor_names("lm_head.weight", tied=False) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
    ],
)
def test_what_would_be_converted_wrongly_is_refused(text: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceError, match=named):
        FAMILY.check(CONFIG, {**CONFIG["text_config"], **text})


@pytest.mark.parametrize("rope", [{"type": "mrope"}, {"rope_type": "default"}, None])
def test_the_rotary_positions_of_real_checkpoints_are_taken(rope: dict[str, Any] | None) -> None:
    """The hub's say {"type": "mrope"}, newly saved ones "default"; a window that is off may still have a size."""
    text = {**CONFIG["text_config"], "rope_parameters": rope, "use_sliding_window": False, "sliding_window": 32768}
    FAMILY.check(CONFIG, text)


@pytest.mark.parametrize("key", ["image_token_id", "vision_start_token_id", "vision_end_token_id", "vision_config"])
def test_a_config_that_lacks_an_id_is_refused(key: str) -> None:
    with pytest.raises(SourceError, match=key):
        FAMILY.check({k: v for k, v in CONFIG.items() if k != key}, CONFIG["text_config"])


@pytest.mark.parametrize("model_type", ["llama", "qwen2_5_vl", None])
def test_another_family_is_refused_with_those_there_are(model_type: str | None) -> None:
    with pytest.raises(SourceError, match=r"config\.json.*not converted.*qwen2_vl"):
        family_named(model_type, Path("config.json"))
