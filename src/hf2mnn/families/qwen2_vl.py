"""Qwen2-VL: a Qwen2 decoder with M-RoPE, and a vision transformer with full attention over the patches of a picture.

M-RoPE and the order of patches follow the model's description in transformers (`modeling_qwen2_vl.py`); the inputs
of the vision graph follow `Omni::qwen2VisionProcess` of MNN's engine 3.6.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.errors import EvaluationSetError, SourceError
from hf2mnn.families.base import Family, Fold

if TYPE_CHECKING:
    import torch


class Qwen2VL(Family):
    model_type = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    special_tokens: ClassVar = {
        "image_token_id": "<|image_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        if text_config.get("use_sliding_window"):
            raise SourceError(
                "this Qwen2-VL uses sliding window attention (use_sliding_window), which is not converted"
            )
        rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise SourceError(f"config.json of this Qwen2-VL says {rope!r} of its rotary positions; download it again")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):
            raise SourceError(f"this Qwen2-VL scales its rotary positions by {kind!r}, which is not converted")
        for key in ("image_token_id", "vision_start_token_id", "vision_end_token_id", "vision_config"):
            if key not in config:
                raise SourceError(f"config.json of this Qwen2-VL has no {key}: it is not complete")
        if not isinstance(config["vision_config"], dict):
            raise SourceError("config.json of this Qwen2-VL has a vision_config that is no JSON object")

    def tensor_names(self, parameter: str, tied: bool) -> list[str]:
        if parameter == "lm_head.weight":
            embedding = self.tensor_names("model.language_model.embed_tokens.weight", tied)
            return embedding if tied else ["lm_head.weight"]
        # transformers 4.52 and later name the parts inside the model; the hub's checkpoints are older.
        older = parameter.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        return [parameter, older]

    def language_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.model.language_model

    def vision_tower(self, model: torch.nn.Module, attention: Callable[..., torch.Tensor]) -> torch.nn.Module:
        from hf2mnn.families.qwen2_vl_vision import VisionTower

        return VisionTower(model.model.visual, attention)

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, merge_size: int) -> dict[str, np.ndarray]:
        """patches float32 [n, channels * 2 * patch * patch]; position_ids int32 [2, n] (row, column of each patch, in
        the order of the patches: merged squares first); attention_mask float32 [1, n, n], added to the scores."""
        frames, height, width = (int(side) for side in grid_thw)
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        squares = (height // merge_size, merge_size, width // merge_size, merge_size)
        order = [side.reshape(squares).transpose(0, 2, 1, 3).reshape(-1) for side in (rows, columns)]
        positions = np.tile(np.stack(order), (1, frames)).astype(np.int32)
        # A frame sees only itself; a picture is one frame.
        frame = np.repeat(np.arange(frames), height * width)
        mask = np.where(frame[:, None] == frame[None, :], 0.0, np.finfo(np.float32).min).astype(np.float32)
        return {
            "patches": np.ascontiguousarray(pixel_values, dtype=np.float32),
            "position_ids": positions,
            "attention_mask": mask[None],
        }

    def vision_axes(self) -> dict[str, dict[int, str]]:
        return {
            "patches": {0: "patches"},
            "position_ids": {1: "patches"},
            "attention_mask": {1: "patches", 2: "patches"},
        }

    def position_ids(
        self, input_ids: np.ndarray, grids: list[np.ndarray], image_token_id: int, merge_size: int
    ) -> np.ndarray:
        """M-RoPE: text counts on in all three rows; a picture's tokens share one time and count rows and columns;
        the text after it goes on from the largest position so far."""
        columns, next_position, token, pictures = [], 0, 0, iter(grids)
        while token < len(input_ids):
            if input_ids[token] != image_token_id:
                columns.append(np.full((3, 1), next_position))
                next_position, token = next_position + 1, token + 1
                continue
            frames, height, width = (int(side) for side in next(pictures))
            height, width = height // merge_size, width // merge_size
            picture = np.stack(np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij"))
            columns.append(picture.reshape(3, -1) + next_position)
            next_position, token = next_position + max(height, width), token + frames * height * width
        return np.concatenate(columns, axis=1).astype(np.int64)

    def picture_size(self, width: int, height: int, model: dict[str, Any]) -> tuple[int, int]:
        """Both sides multiples of a merged patch, the area within bounds, the shape kept as well as that allows
        (`smart_resize` in transformers).

        Raises:
            EvaluationSetError: the picture is over 200 times longer than wide, which transformers refuses.
        """
        if max(width, height) > 200 * min(width, height):
            raise EvaluationSetError(f"a {width} x {height} picture is over 200 times longer than wide; crop it")
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
            "is_visual": True,
            "is_mrope": True,
            "image_mean": [float(value) for value in mean * 255],
            "image_norm": [float(value) for value in 1 / (std * 255)],
            "image_size": 420,
            "image_pad": model["image_token_id"],
            "vision_start": model["vision_start_token_id"],
            "vision_end": model["vision_end_token_id"],
        }

    def folds(self, model: dict[str, Any]) -> list[Fold]:
        """Normalizations and what reads them, values and the output projection, up and down. In the vision tower only
        the normalizations: GELU bends what is between its linear layers, and values share a layer with queries."""
        group, found = model["num_attention_heads"] // model["num_key_value_heads"], []
        for index in range(model["num_hidden_layers"]):
            layer = f"model.language_model.layers.{index}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            projections = tuple(f"{attention}.{name}_proj" for name in "qkv")
            found += [
                Fold(f"{layer}.input_layernorm", projections),
                Fold(
                    f"{attention}.v_proj", (f"{attention}.o_proj",), (f"{attention}.context",), group, model["head_dim"]
                ),
                Fold(f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
                Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
            ]
        for index in range(model["vision_depth"]):
            block = f"model.visual.blocks.{index}"
            found.append(Fold(f"{block}.norm1", (f"{block}.attn.qkv",)))
            found.append(Fold(f"{block}.norm2", (f"{block}.mlp.fc1",)))
        return found
