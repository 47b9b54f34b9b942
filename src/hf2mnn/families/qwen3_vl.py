"""Qwen3-VL: interpolated learned position embeddings in the vision tower, and deepstack.

Deepstack adds features of three of the tower's blocks to the image tokens after the first three decoder layers.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.engine_limits import DEEPSTACK_LAYERS, QWEN3_VL_PATCH_SIZE
from hf2mnn.families.vision import VisionFamily

if TYPE_CHECKING:
    import torch


class Qwen3VL(VisionFamily):
    """Qwen3-VL."""

    model_type = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    patch_size = QWEN3_VL_PATCH_SIZE
    identical_blocks = False
    mlp_input_layers: ClassVar = ("linear_fc1",)
    deepstack_layers = DEEPSTACK_LAYERS
    vision_outputs: ClassVar = ["image_embeds", "deepstack_feature"]
    vision_axes: ClassVar = VisionFamily.vision_axes | {"idx_tensor": {1: "patches"}, "weight_tensor": {1: "patches"}}

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        """Check that all features are supported, and that deepstack has the engine's number of layers."""
        super().check(config, text_config)
        blocks = config["vision_config"].get("deepstack_visual_indexes", [8, 16, 24])
        if not isinstance(blocks, list) or len(blocks) != self.deepstack_layers:
            raise CheckpointError(
                f"vision_config.deepstack_visual_indexes of this {self.model_type} checkpoint is {blocks}, and MNN's"
                f" engine adds the features of {self.deepstack_layers} blocks; choose another checkpoint"
            )

    def model_info(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the family's entries of model.json, with the side of the grid of learned positions."""
        positions = (config.get("vision_config") or {}).get("num_position_embeddings", 2304)
        side = round(positions**0.5) if isinstance(positions, int) and positions > 0 else 0
        if side**2 != positions:
            raise self._faulty_config(f"an invalid vision_config.num_position_embeddings (not a square): {positions!r}")
        return {**super().model_info(config), "num_grid_per_side": side}

    def prepare(self, model: torch.nn.Module) -> None:
        """Interleave the M-RoPE tables of time, height and width by one gather.

        transformers assigns to slices, which traces to a ScatterND that crashes MNN's converter.
        """
        import torch

        rotary = self.language_model(model).rotary_emb
        section, half = rotary.mrope_section, len(rotary.inv_freq)
        axes = torch.zeros(half, dtype=torch.long)
        for axis in (1, 2):
            axes[axis : section[axis] * 3 : 3] = axis
        order = (axes * half + torch.arange(half)).repeat(2)
        # freq [3, 1, tokens, half] to [1, tokens, head_dim]
        rotary.recomposition_frequencies = lambda freq: torch.cat(freq.unbind(0), dim=-1)[..., order]

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs as `VisionFamily`, with the interpolation of learned positions.

        idx_tensor is int32 and weight_tensor float32 [4, n]: the four learned positions around each patch, and their
        weights in bilinear interpolation with aligned corners.
        """
        frames, height, width = (int(size) for size in grid_thw)
        side = info["num_grid_per_side"]

        def neighbors(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
            """Return the learned positions before and after each of n patches of an axis, with their weights."""
            coordinate = np.arange(n, dtype=np.float32) * (side - 1) / max(n - 1, 1)
            low = coordinate.astype(np.int32)
            return [(low, 1 - (coordinate - low)), (np.minimum(low + 1, side - 1), coordinate - low)]

        corners = list(product(neighbors(height), neighbors(width)))
        indices = [row[:, None] * side + column for (row, _), (column, _) in corners]
        weights = [row[:, None] * column for (_, row), (_, column) in corners]

        def per_patch(values: list[np.ndarray], dtype: type) -> np.ndarray:
            frame = np.stack([self.patch_order(value, info["merge_size"]) for value in values])
            return np.tile(frame, (1, frames)).astype(dtype)

        return {
            **super().vision_inputs(pixel_values, grid_thw, info),
            "idx_tensor": per_patch(indices, np.int32),
            "weight_tensor": per_patch(weights, np.float32),
        }

    def tower_arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the arguments of the tower's forward, with the interpolation of learned positions."""
        return super().tower_arguments(inputs) | {
            "interp_indices": inputs["idx_tensor"].transpose(0, 1),
            "interp_weights": inputs["weight_tensor"].transpose(0, 1),
        }

    def engine_config(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return the family's entries of llm_config.json."""
        deepstack = {"has_deepstack": True, "num_grid_per_side": info["num_grid_per_side"]}
        return super().engine_config(info) | deepstack
