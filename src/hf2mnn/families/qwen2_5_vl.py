"""Qwen2.5-VL: window attention over 8 x 8 patches in most blocks of the vision tower, full attention in the others.

Inside the tower, merged patches are ordered by window (`window_index`), so that a window is contiguous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.engine_limits import WINDOW
from hf2mnn.families.vision import MASKED, VisionFamily

if TYPE_CHECKING:
    import torch


class Qwen25VL(VisionFamily):
    """Qwen2.5-VL."""

    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    mlp_input_layers: ClassVar = ("gate_proj", "up_proj")
    full_attention_blocks = "fullatt_block_indexes"
    vision_axes: ClassVar = VisionFamily.vision_axes | {
        "attention_mask": {2: "patches", 3: "patches"},
        "window_index": {0: "image tokens"},
    }

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        """Check that all features are supported, and that windows have the engine's size."""
        super().check(config, text_config)
        vision = config["vision_config"]
        window = vision.get("window_size", 112)
        if window != WINDOW * vision.get("spatial_merge_size", 2) * vision.get("patch_size", 14):
            raise CheckpointError(
                f"vision_config.window_size of this {self.model_type} checkpoint is {window} pixels, and MNN's engine"
                f" has windows of {WINDOW} x {WINDOW} merged patches only; choose another checkpoint"
            )

    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs as `VisionFamily`, but masks of both kinds of attention, and the order of the windows.

        attention_mask is float32 [2, 1, n, n]: of full and of window attention, both in window order. window_index is
        int32 [n / 4]: the merged patches in window order.
        """
        inputs, merge = super().vision_inputs(pixel_values, grid_thw, info), info["merge_size"]
        frames, height, width = (int(grid_thw[0]), int(grid_thw[1]) // merge, int(grid_thw[2]) // merge)
        frame, row, column = (axis.reshape(-1) for axis in np.indices((frames, height, width)))
        windows = np.stack([frame, row // WINDOW, column // WINDOW])
        # lexsort is stable: within a window, patches keep their row-major order.
        order = np.lexsort(windows[::-1])
        patches = windows[:, order].repeat(merge**2, axis=1)
        same_window = (patches[:, :, None] == patches[:, None, :]).all(axis=0)
        mask = np.where(same_window, np.float32(0), MASKED)
        inputs["attention_mask"] = np.stack([inputs["attention_mask"], mask[None]])
        return {**inputs, "window_index": order.astype(np.int32)}

    def tower_arguments(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the arguments of the tower's forward, with the window mask in place of the windows' lengths."""
        full_mask, window_mask = inputs["attention_mask"].unbind(0)
        return {
            **super().tower_arguments(inputs),
            "cu_seqlens": full_mask,
            "cu_window_seqlens": window_mask,
            "max_window_seqlen": 1,
            "window_index": inputs["window_index"].long(),
        }
