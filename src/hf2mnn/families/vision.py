"""What the families that see have in common: a vision transformer over the patches of an image, M-RoPE, and the way in
which MNN's engine feeds them.

M-RoPE and the order of patches follow the models' descriptions in transformers; the inputs of the vision graph follow
`Omni::qwen2VisionProcess` of MNN's engine 3.6.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import CheckpointError, EvaluationSetError
from hf2mnn.families.base import Family, Fold

if TYPE_CHECKING:
    import torch

# What transformers' Qwen2VLImageProcessor takes where preprocessor_config.json leaves it out.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
NOT_SEEN = np.finfo(np.float32).min
IDS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
BUILT_IN = {"temporal_patch_size": 2, "merge_size": 2}
"""Of the engine, whatever a configuration says; `patch_size` is by family."""


class VisionFamily(Family):
    """A decoder that is shown images."""

    sees = True
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    special_tokens: ClassVar = {
        "image_token_id": "<|image_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    decoder, vision = "model.language_model", "model.visual"
    # transformers 4.52 and later name the parts inside the model; the hub's checkpoints are older.
    older = (("model.language_model.", "model."), ("model.visual.", "visual."))
    rows = 3
    rotary = Family.rotary | {"mrope"}
    patch_size = 14
    """Sides of a patch as the engine cuts it."""
    width = "hidden_size"
    """Key of the vision tower's width in its configuration."""
    mlp_inputs: ClassVar[tuple[str, ...]] = ("fc1",)
    """Layers of a block's MLP that read its normalization."""
    blocks_alike = True
    """Whether every block of the tower computes the same but for its weights and what its attention may see."""
    full_attention: str | None = None
    """Attribute of the tower that lists the blocks whose attention sees all patches, where that of others does not."""

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        super().check(config, text_config)
        for key in (*IDS, "vision_config"):
            if key not in config:
                raise CheckpointError(f"config.json of this {self.model_type} has no {key}: it is not complete")
        if not isinstance(config["vision_config"], dict):
            raise CheckpointError(f"config.json of this {self.model_type} has a vision_config that is no JSON object")

    def facts(self, config: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
        size = processor.get("size")
        size = size if isinstance(size, dict) else {}
        return {
            **{key: config.get(key) for key in IDS},
            "patch_size": processor.get("patch_size", 14),
            "temporal_patch_size": processor.get("temporal_patch_size", 2),
            "merge_size": processor.get("merge_size", 2),
            "vision_depth": (config.get("vision_config") or {}).get("depth", 32),
            "image_mean": processor.get("image_mean", CLIP_MEAN),
            "image_std": processor.get("image_std", CLIP_STD),
            "min_pixels": processor.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
            "max_pixels": processor.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
        }

    def tower(self, model: torch.nn.Module) -> torch.nn.Module:
        """The vision tower with its projector."""
        return model.get_submodule(self.vision)

    def tower_arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of the tower's forward in transformers for the tensors of `vision_inputs`. It takes what follows
        from the grid as it is given, and hands what stands for the lengths of sequences to its attention, unseen: so a
        mask [1, n, n] stands there.
        """
        return {
            "hidden_states": inputs["patches"],
            "grid_thw": None,
            "position_ids": inputs["position_ids"].transpose(0, 1),
            "cu_seqlens": inputs["attention_mask"],
            "max_seqlen": 1,
        }

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, model: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the vision graph for one image, by name, in the order in which MNN's engine feeds them; `model`
        is model.json.

        patches float32 [n, channels * 2 * patch * patch]; position_ids int32 [2, n] (row, column of each patch, in the
        order of the patches: merged squares first); attention_mask float32 [1, n, n], added to the scores.
        """
        frames, height, width = (int(side) for side in grid_thw)
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        positions = np.stack([self.in_squares(side, model["merge_size"]) for side in (rows, columns)])
        # A frame sees only itself; an image is one frame.
        frame = np.repeat(np.arange(frames), height * width)
        mask = np.where(frame[:, None] == frame[None, :], np.float32(0), NOT_SEEN)
        return {
            "patches": np.ascontiguousarray(pixel_values, dtype=np.float32),
            "position_ids": np.tile(positions, (1, frames)).astype(np.int32),
            "attention_mask": mask[None],
        }

    @staticmethod
    def in_squares(values: np.ndarray, merge_size: int) -> np.ndarray:
        """[height, width] of a frame to [height * width] in the order of its patches."""
        height, width = values.shape
        squares = (height // merge_size, merge_size, width // merge_size, merge_size)
        return values.reshape(squares).transpose(0, 2, 1, 3).reshape(-1)

    @property
    def vision_outputs(self) -> list[str]:
        return ["image_embeds", *(["deepstack_feature"] if self.deepstack else [])]

    @staticmethod
    def as_rows(outputs: list[np.ndarray]) -> np.ndarray:
        """float32 [rows, hidden] of what the vision graph gives: image tokens, and with deepstack as many more for each
        of its layers.
        """
        return np.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])

    def vision_axes(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of the vision graph's inputs."""
        return {
            "patches": {0: "patches"},
            "position_ids": {1: "patches"},
            "attention_mask": {1: "patches", 2: "patches"},
        }

    def position_ids(self, input_ids: np.ndarray, grids: list[np.ndarray], model: dict[str, Any]) -> np.ndarray:
        """M-RoPE: text counts on in all three rows; an image's tokens share one time and count rows and columns;
        the text after it goes on from the largest position so far.
        """
        image_token, merge = model["image_token_id"], model["merge_size"]
        columns, next_position, token, images = [], 0, 0, iter(grids)
        while token < len(input_ids):
            grid = next(images, None) if input_ids[token] == image_token else None
            if grid is None:  # an image token without an image is what a bad answer goes on with
                columns.append(np.full((3, 1), next_position))
                next_position, token = next_position + 1, token + 1
                continue
            frames, height, width = (int(side) for side in grid)
            height, width = height // merge, width // merge
            cells = np.stack(np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij"))
            columns.append(cells.reshape(3, -1) + next_position)
            next_position, token = next_position + max(height, width), token + frames * height * width
        return np.concatenate(columns, axis=1).astype(np.int64)

    def image_size(self, width: int, height: int, model: dict[str, Any]) -> tuple[int, int]:
        """(width, height) to which the checkpoint's processor resizes an image: both sides multiples of a merged
        patch, the area within bounds, the shape kept as well as that allows (`smart_resize` in transformers). `model`
        is model.json.

        Raises:
            EvaluationSetError: the image is over 200 times longer than wide, which transformers refuses.
        """
        if max(width, height) > 200 * min(width, height):
            raise EvaluationSetError(f"a {width} x {height} image is over 200 times longer than wide; crop it")
        unit = model["patch_size"] * model["merge_size"]
        low, high = model["min_pixels"] or 0, model["max_pixels"] or float("inf")
        sides = [round(side / unit) * unit for side in (width, height)]
        area = sides[0] * sides[1]
        if area > high:
            scale = math.sqrt(width * height / high)
            sides = [max(unit, math.floor(side / scale / unit) * unit) for side in (width, height)]
        elif area < low:
            scale = math.sqrt(low / (width * height))
            sides = [math.ceil(side * scale / unit) * unit for side in (width, height)]
        return sides[0], sides[1]

    def engine_config(self, model: dict[str, Any]) -> dict[str, Any]:
        mean, std = np.array(model["image_mean"]), np.array(model["image_std"])
        return {
            **super().engine_config(model),
            "is_visual": True,
            "image_mean": [float(value) for value in mean * 255],
            "image_norm": [float(value) for value in 1 / (std * 255)],
            "image_size": 420,
            "image_pad": model["image_token_id"],
            "vision_start": model["vision_start_token_id"],
            "vision_end": model["vision_end_token_id"],
        }

    def linear_inputs(self, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, list[int]]:
        sizes = [int(vision_config.get(key) or 0) for key in (self.width, "intermediate_size")]
        return {**super().linear_inputs(text_config, vision_config), "vision": sizes}

    def folds(self, model: dict[str, Any]) -> list[Fold]:
        """In the vision tower only the normalizations: what is between its linear layers is bent, and values share a
        layer with queries.
        """
        found = super().folds(model)
        for index in range(model["vision_depth"]):
            block = f"{self.vision}.blocks.{index}"
            found.append(Fold(f"{block}.norm1", (f"{block}.attn.qkv",)))
            found.append(Fold(f"{block}.norm2", tuple(f"{block}.mlp.{name}" for name in self.mlp_inputs)))
        return found
