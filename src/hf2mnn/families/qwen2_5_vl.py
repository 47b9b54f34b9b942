"""Qwen2.5-VL: most blocks of its vision tower let a patch see only its window of 8 x 8 patches, the others all.

Within the tower the merged squares are in the order of the windows (`window_index`), so that a window is one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.vision import NOT_SEEN, VisionFamily

if TYPE_CHECKING:
    import torch

WINDOW = 4
"""Merged squares in each direction of a window: built into the engine."""


class Qwen25VL(VisionFamily):
    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    mlp_inputs: ClassVar = ("gate_proj", "up_proj")
    full_attention = "fullatt_block_indexes"

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        super().check(config, text_config)
        vision = config["vision_config"]
        sizes = [vision.get(key, usual) for key, usual in (("window_size", 112), ("patch_size", 14))]
        merge = vision.get("spatial_merge_size", 2)
        if sizes[0] != WINDOW * merge * sizes[1]:
            raise CheckpointError(
                f"this {self.model_type} has windows of {sizes[0]} pixels; MNN's engine makes them of"
                f" {WINDOW} x {WINDOW} merged patches, so it cannot run this vision tower"
            )

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, model: dict[str, Any]) -> dict[str, Any]:
        """attention_mask is float32 [2, 1, n, n], of all patches and of windows, in the order of the windows;
        window_index int32 [n / 4] has the merged squares in that order.
        """
        inputs = super().vision_inputs(pixel_values, grid_thw, model)
        merge = model["merge_size"]
        frames, height, width = (int(grid_thw[0]), int(grid_thw[1]) // merge, int(grid_thw[2]) // merge)
        frame, row, column = (side.reshape(-1) for side in np.indices((frames, height, width)))
        windows = np.stack([frame, row // WINDOW, column // WINDOW])
        # Stable: within a window rows come one after another.
        order = np.lexsort(windows[::-1])
        squares = windows[:, order].repeat(merge**2, axis=1)
        same = (squares[:, :, None] == squares[:, None, :]).all(axis=0)
        mask = np.where(same, np.float32(0), NOT_SEEN)
        inputs["attention_mask"] = np.stack([inputs["attention_mask"], mask[None]])
        return {**inputs, "window_index": order.astype(np.int32)}

    def vision_axes(self) -> dict[str, dict[int, str]]:
        axes = super().vision_axes()
        return {**axes, "attention_mask": {2: "patches", 3: "patches"}, "window_index": {0: "image tokens"}}

    def tower_arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        everything, windows = inputs["attention_mask"].unbind(0)
        seen = {**super().tower_arguments(inputs), "cu_seqlens": everything, "cu_window_seqlens": windows}
        return {**seen, "max_window_seqlen": 1, "window_index": inputs["window_index"].long()}
