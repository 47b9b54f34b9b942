"""Families with image input: position ids, masks and image sizes in numpy, against transformers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from checkpoints import SHAPES, configuration
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families import FAMILIES, VisionFamily
from support import SHAPES_VL

CONFIG = json.loads((SHAPES_VL / "config.json").read_text())
IMAGE, MERGE, SIDE = CONFIG["image_token_id"], 2, 7
MODEL = {"image_token_id": IMAGE, "merge_size": MERGE, "num_grid_per_side": SIDE}
TEXT_TOKEN = 7
VISION_TYPES = sorted(name for name, family in FAMILIES.items() if family.has_vision)

sides = st.integers(1, 9).map(lambda merged: merged * MERGE)
grids = st.tuples(st.just(1), sides, sides)
texts = st.integers(1, 20)


@pytest.fixture(scope="module", params=VISION_TYPES)
def family(request: pytest.FixtureRequest) -> VisionFamily:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: VisionFamily) -> transformers.PreTrainedModel:
    """Model of transformers on the device "meta", for its arithmetic on positions."""
    shape = next(shape for shape in SHAPES.values() if shape.model_type == family.model_type)
    with torch.device("meta"):
        return getattr(transformers, family.architecture)(configuration(shape))


def prompt(parts: list[int | tuple[int, int, int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the ids of texts (given as numbers of tokens) and images (given as grids), and the grids."""
    images = [np.array(part) for part in parts if isinstance(part, tuple)]
    runs = [
        [IMAGE] * (part[1] * part[2] // MERGE**2) if isinstance(part, tuple) else [TEXT_TOKEN] * part for part in parts
    ]
    return np.concatenate([np.array(run, np.int64) for run in runs]), images


def interleave(images: list[tuple[int, int, int]], between: list[int], head: int, tail: int) -> list[Any]:
    """Put text between images, where the chat template has vision_end and vision_start."""
    parts: list[Any] = [head] if head else []
    for index, grid in enumerate(images):
        parts += [grid] if index == 0 else [between[index % len(between)], grid]
    return [*parts, tail] if tail else parts


@given(
    images=st.lists(grids, min_size=1, max_size=4),
    between=st.lists(texts, min_size=1, max_size=3),
    head=st.integers(0, 20),
    tail=st.integers(0, 20),
)
@settings(max_examples=25, deadline=None)
def test_positions_are_those_of_transformers(
    family: VisionFamily, model: transformers.PreTrainedModel, images: list, between: list[int], head: int, tail: int
) -> None:
    """A wrong position after an image changes the answer only slightly."""
    ids, image_grids = prompt(interleave(images, between, head, tail))
    kinds = torch.from_numpy(ids == IMAGE).int()[None]
    theirs, _ = model.model.get_rope_index(torch.from_numpy(ids)[None], kinds, torch.from_numpy(np.stack(image_grids)))
    ours = family.position_ids(ids, image_grids, MODEL)
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


@given(length=st.integers(1, 300))
@settings(max_examples=10, deadline=None)
def test_text_has_the_same_positions_in_all_rows(family: VisionFamily, length: int) -> None:
    ids, _ = prompt([length])
    np.testing.assert_array_equal(family.position_ids(ids, [], MODEL), np.tile(np.arange(length), (3, 1)))


@given(height=sides, width=sides, frames=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_patch_positions_are_those_of_transformers(height: int, width: int, frames: int) -> None:
    """Patches are ordered by merged patch, not row by row."""
    grid = np.array([frames, height, width])
    pixels = np.zeros((int(grid.prod()), 4), np.float64)
    inputs = FAMILIES["qwen2_vl"].vision_inputs(pixels, grid, MODEL)
    theirs = get_vision_position_ids(torch.from_numpy(grid)[None], MERGE)
    np.testing.assert_array_equal(inputs["position_ids"], theirs.numpy().T)
    assert [inputs[name].dtype for name in ("patches", "position_ids", "attention_mask")] == ["f4", "i4", "f4"]
    # transformers splits attention at cu_seqlens, one length for each frame.
    frame = np.repeat(np.arange(frames), height * width)
    np.testing.assert_array_equal(inputs["attention_mask"][0] == 0, frame[:, None] == frame[None, :])


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    bounds=st.sampled_from([(3136, 200704), (3136, 12845056), (65536, 65536), (200000, 262144)]),
)
@example(width=1000, height=10, bounds=(3136, 200704))
@settings(max_examples=100, deadline=None)
def test_image_sizes_are_those_of_transformers(width: int, height: int, bounds: tuple[int, int]) -> None:
    """Another size is another number of image tokens.

    transformers rounds a side under half a merged patch to 0, and then enlarges the image.
    """
    assume(max(width, height) <= 200 * min(width, height))  # others are refused
    low, high = bounds
    model = {"patch_size": 14, "merge_size": MERGE, "min_pixels": low, "max_pixels": high}
    rows, columns = smart_resize(height, width, 28, low, high)
    assert FAMILIES["qwen2_vl"].image_size(width, height, model) == (columns, rows)


@given(height=sides, width=sides, frames=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_windows_are_those_of_transformers(height: int, width: int, frames: int) -> None:
    """Images of several windows; those at the edges are smaller."""
    grid = np.array([frames, height, width])
    inputs = FAMILIES["qwen2_5_vl"].vision_inputs(np.zeros((int(grid.prod()), 4)), grid, MODEL)
    index, ends = get_vision_window_index(torch.from_numpy(grid)[None], MERGE, 112, 14)
    np.testing.assert_array_equal(inputs["window_index"], index.numpy())
    window = np.searchsorted(ends.numpy()[1:], np.arange(grid.prod()), side="right")
    np.testing.assert_array_equal(inputs["attention_mask"][1, 0] == 0, window[:, None] == window[None, :])
    assert inputs["attention_mask"].shape == (2, 1, grid.prod(), grid.prod())
    assert inputs["window_index"].dtype == np.int32


@given(height=sides, width=sides, frames=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_learned_positions_are_interpolated_as_in_transformers(height: int, width: int, frames: int) -> None:
    grid = np.array([frames, height, width])
    inputs = FAMILIES["qwen3_vl"].vision_inputs(np.zeros((int(grid.prod()), 4)), grid, MODEL)
    indices, weights = get_vision_interpolation_indices_and_weights(
        torch.from_numpy(grid)[None], SIDE, "bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    table = np.random.default_rng(0).standard_normal(SIDE**2)
    # At a grid point, rounding chooses between two neighbours, one of which has weight 0.
    ours = (table[inputs["idx_tensor"]] * inputs["weight_tensor"]).sum(axis=0)
    np.testing.assert_allclose(ours, (table[indices.numpy()] * weights.numpy()).sum(axis=1), atol=1e-5)
    assert [inputs[name].dtype for name in ("idx_tensor", "weight_tensor")] == ["i4", "f4"]


@pytest.mark.parametrize(
    ("model_type", "vision", "message"),
    [
        ("qwen2_5_vl", {"window_size": 224}, "window_size of this qwen2_5_vl checkpoint is 224 pixels"),
        (
            "qwen3_vl",
            {"deepstack_visual_indexes": [3, 7]},
            r"deepstack_visual_indexes of this qwen3_vl checkpoint is \[3, 7\]",
        ),
    ],
)
def test_settings_that_differ_from_the_engines_constants_are_refused(
    model_type: str, vision: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*engine"):
        FAMILIES[model_type].check({**CONFIG, "vision_config": vision}, CONFIG["text_config"])
