"""Qwen3-VL: learned positions in the vision tower, resampled to the image's grid, and deepstack: what three of the
tower's blocks see is added to the image's tokens after the first three layers of the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.vision import VisionFamily

if TYPE_CHECKING:
    import torch


class Qwen3VL(VisionFamily):
    model_type = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    older = ()
    patch_size = 16
    blocks_alike = False
    mlp_inputs: ClassVar = ("linear_fc1",)
    deepstack = 3

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        super().check(config, text_config)
        places = config["vision_config"].get("deepstack_visual_indexes", [8, 16, 24])
        if not isinstance(places, list) or len(places) != self.deepstack:
            raise CheckpointError(
                f"this {self.model_type} takes deepstack features of the blocks {places}; MNN's engine adds those of"
                f" {self.deepstack}, so it cannot run this model"
            )

    def facts(self, config: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
        positions = (config.get("vision_config") or {}).get("num_position_embeddings", 2304)
        side = round(positions**0.5) if isinstance(positions, int) and positions > 0 else 0
        if side**2 != positions:
            raise CheckpointError(
                f"config.json of this {self.model_type} says num_position_embeddings {positions!r}, which"
                " is no square; download it again"
            )
        return {**super().facts(config, images), "num_grid_per_side": side}

    def prepare(self, model: torch.nn.Module) -> None:
        """The rotary tables of rows, columns and times are woven by one look-up: transformers writes into slices, and
        MNN's converter dies of the scatter that follows from that.
        """
        import torch

        rotary = self.language_model(model).rotary_emb
        section, half = rotary.mrope_section, len(rotary.inv_freq)
        axes = torch.zeros(half, dtype=torch.long)
        for axis in (1, 2):
            axes[axis : section[axis] * 3 : 3] = axis
        order = axes * half + torch.arange(half)
        order = torch.cat([order, order])
        # freq [3, 1, tokens, half] to [1, tokens, head size]
        rotary.recomposition_frequencies = lambda freq: torch.cat(freq.unbind(0), dim=-1)[..., order]

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, model: dict[str, Any]) -> dict[str, Any]:
        """idx_tensor int32 and weight_tensor float32 [4, n]: the four learned positions around each patch, and their
        weights (bilinear, corners on corners).
        """
        frames, height, width = (int(side) for side in grid_thw)
        side = model["num_grid_per_side"]
        places = [np.arange(count, dtype=np.float32) * (side - 1) / max(count - 1, 1) for count in (height, width)]
        low = [place.astype(np.int32) for place in places]
        high = [np.minimum(floor + 1, side - 1) for floor in low]
        upper = [place - floor for place, floor in zip(places, low, strict=True)]
        rows = ((low[0], 1 - upper[0]), (high[0], upper[0]))
        columns = ((low[1], 1 - upper[1]), (high[1], upper[1]))
        corners = [(row, column) for row in rows for column in columns]
        indices = [row[:, None] * side + column[None, :] for (row, _), (column, _) in corners]
        weights = [row[:, None] * column[None, :] for (_, row), (_, column) in corners]

        def ordered(values: list[np.ndarray], dtype: type) -> np.ndarray:
            frame = np.stack([self.in_squares(value, model["merge_size"]) for value in values])
            return np.tile(frame, (1, frames)).astype(dtype)

        found = {"idx_tensor": ordered(indices, np.int32), "weight_tensor": ordered(weights, np.float32)}
        return {**super().vision_inputs(pixel_values, grid_thw, model), **found}

    def vision_axes(self) -> dict[str, dict[int, str]]:
        return {**super().vision_axes(), "idx_tensor": {1: "patches"}, "weight_tensor": {1: "patches"}}

    def tower_arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        taps = {"interp_indices": inputs["idx_tensor"].transpose(0, 1)}
        taps["interp_weights"] = inputs["weight_tensor"].transpose(0, 1)
        return {**super().tower_arguments(inputs), **taps}

    def engine_config(self, model: dict[str, Any]) -> dict[str, Any]:
        own = {"has_deepstack": True, "num_grid_per_side": model["num_grid_per_side"]}
        return {**super().engine_config(model), **own}
