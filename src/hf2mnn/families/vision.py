"""Base class of families with image input: a vision transformer over image patches, and M-RoPE.

M-RoPE and the order of patches are those of transformers. The inputs of the vision graph are those that
`Omni::qwen2VisionProcess` of MNN 3.6.1 (transformers/llm/engine/src/omni.cpp) feeds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.families.base import Family, Fold
from hf2mnn.families.engine_limits import IMAGE_SIZE, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

if TYPE_CHECKING:
    import torch

MASKED = np.finfo(np.float32).min  # value of an attention mask where a query must not attend to a key
BUILT_IN = {"temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE}
"""Constants of MNN's engine that no configuration changes; `VisionFamily.patch_size` is one too."""
MAX_ASPECT_RATIO = 200  # of an image's sides; transformers refuses a larger one


class VisionFamily(Family):
    """Decoder with a vision tower."""

    has_vision = True
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"
    image_placeholder = f"<|vision_start|>{image_token}<|vision_end|>"
    special_tokens: ClassVar = {
        "image_token_id": image_token,
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    decoder, vision = "model.language_model", "model.visual"  # modules; the second with its projector
    position_rows = 3
    rope_types = Family.rope_types | {"mrope"}
    patch_size = PATCH_SIZE
    width_key = "hidden_size"  # in vision_config
    mlp_input_layers: ClassVar[tuple[str, ...]] = ("fc1",)  # they consume the second normalization of a block
    identical_blocks = True  # but for weights and attention masks
    vision_outputs: ClassVar = ["image_embeds"]
    vision_axes: ClassVar[dict[str, dict[int, str]]] = {  # dynamic axes of the vision graph's inputs
        "patches": {0: "patches"},
        "position_ids": {1: "patches"},
        "attention_mask": {1: "patches", 2: "patches"},
    }
    full_attention_blocks: str | None = None  # attribute of the tower: indices of blocks with full attention; None: all

    def model_info(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the family's entries of model.json: token ids, and the depth of the vision tower."""
        ids = {key: config.get(key) for key in self.special_tokens}
        return {**ids, "vision_depth": (config.get("vision_config") or {}).get("depth", 32)}

    def tower_arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Map the inputs of the vision graph to the arguments of the tower's forward in transformers.

        The tower passes `cu_seqlens` to its attention unchanged, so a mask [1, n, n] can replace it. Values that the
        tower would compute from `grid_thw` are given.
        """
        return {
            "hidden_states": inputs["patches"],
            "grid_thw": None,
            "position_ids": inputs["position_ids"].transpose(0, 1),
            "cu_seqlens": inputs["attention_mask"],
            "max_seqlen": 1,
        }

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the vision graph for one image, in the order in which MNN's engine feeds them.

        `pixel_values` are float32 [n, channels * temporal_patch_size * patch_size * patch_size], `grid_thw` is int64
        [3]: frames, and rows and columns of patches. Returned are patches, as pixel_values; position_ids int32 [2, n]:
        row and column of each patch, in the order of the patches, which is by merged patch; attention_mask float32
        [1, n, n], added to the scores.
        """
        frames, height, width = (int(size) for size in grid_thw)
        positions = np.stack([self.patch_order(axis, info["merge_size"]) for axis in np.indices((height, width))])
        # Attention is within a frame; an image is one frame.
        frame = np.repeat(np.arange(frames), height * width)
        mask = np.where(frame[:, None] == frame[None, :], np.float32(0), MASKED)
        return {
            "patches": np.ascontiguousarray(pixel_values, dtype=np.float32),
            "position_ids": np.tile(positions, (1, frames)).astype(np.int32),
            "attention_mask": mask[None],
        }

    @staticmethod
    def patch_order(values: np.ndarray, merge_size: int) -> np.ndarray:
        """Reorder [height, width] of a frame to [height * width] in the order of its patches."""
        height, width = values.shape
        merged = (height // merge_size, merge_size, width // merge_size, merge_size)
        return values.reshape(merged).transpose(0, 2, 1, 3).reshape(-1)

    @staticmethod
    def concat_outputs(outputs: list[np.ndarray]) -> np.ndarray:
        """Concatenate the outputs of the vision graph to float32 [tokens * (1 + deepstack_layers), hidden]."""
        return np.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])

    def position_ids(self, input_ids: np.ndarray, grids: list[np.ndarray], info: dict[str, Any]) -> np.ndarray:
        """Return M-RoPE position ids (Qwen2-VL, arXiv:2409.12191) of a prompt that starts at position 0.

        Rows are time, height and width. A text token has one position in all three rows. The tokens of an image have
        its start plus their frame, row and column. Text after an image continues at the largest position so far plus 1.
        """
        image_token, merge = info["image_token_id"], info["merge_size"]
        columns, next_position, token, images = [], 0, 0, iter(grids)
        while token < len(input_ids):
            grid = next(images, None) if input_ids[token] == image_token else None
            if grid is None:  # text, or an image token without an image, which a wrong answer may contain
                columns.append(np.full((3, 1), next_position))
                next_position, token = next_position + 1, token + 1
                continue
            frames, height, width = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
            columns.append(np.indices((frames, height, width)).reshape(3, -1) + next_position)
            next_position, token = next_position + max(height, width), token + frames * height * width
        return np.concatenate(columns, axis=1).astype(np.int64)

    def image_size(self, width: int, height: int, info: dict[str, Any]) -> tuple[int, int]:
        """Return the (width, height) of an image for the vision tower: `smart_resize` of transformers.

        Both are multiples of a merged patch, their product is within the bounds of model.json (`info`), and the aspect
        ratio is kept as far as possible. EvaluationSetError if it is over 200.
        """
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise EvaluationSetError(
                f"an image of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT_RATIO}; crop it"
            )
        unit = info["patch_size"] * info["merge_size"]
        low, high = info["min_pixels"], info["max_pixels"]
        sides = [round(side / unit) * unit for side in (width, height)]
        if math.prod(sides) > high:
            scale = math.sqrt(width * height / high)
            sides = [max(unit, math.floor(side / scale / unit) * unit) for side in (width, height)]
        elif math.prod(sides) < low:
            scale = math.sqrt(low / (width * height))
            sides = [math.ceil(side * scale / unit) * unit for side in (width, height)]
        return sides[0], sides[1]

    def engine_config(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return the family's entries of llm_config.json; the engine normalizes pixels from 0 to 255."""
        mean, std = np.array(info["image_mean"]), np.array(info["image_std"])
        return {
            **super().engine_config(info),
            "is_visual": True,
            "image_mean": (mean * 255).tolist(),
            "image_norm": (1 / (std * 255)).tolist(),
            "image_size": IMAGE_SIZE,
            "image_pad": info["image_token_id"],
            "vision_start": info["vision_start_token_id"],
            "vision_end": info["vision_end_token_id"],
        }

    def linear_inputs(self, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, list[int]]:
        """Return the in_features of linear layers by graph; 0 for sizes that the configuration lacks."""
        sizes = [int(vision_config.get(key) or 0) for key in (self.width_key, "intermediate_size")]
        return {**super().linear_inputs(text_config, vision_config), "vision": sizes}

    def folds(self, info: dict[str, Any]) -> list[Fold]:
        """Return the folds of all layers; a block of the vision tower has only its two normalizations.

        Its MLP is not linear between its layers, and values share a linear layer with queries and keys.
        """
        folds = super().folds(info)
        for index in range(info["vision_depth"]):
            block = f"{self.vision}.blocks.{index}"
            folds.append(Fold(f"{block}.norm1", (f"{block}.attn.qkv",)))
            folds.append(Fold(f"{block}.norm2", tuple(f"{block}.mlp.{name}" for name in self.mlp_input_layers)))
        return folds
