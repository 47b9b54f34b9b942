"""Qwen2-VL: Qwen2 decoder with M-RoPE, and a vision transformer with full attention over an image's patches."""

from __future__ import annotations

from typing import Any

from hf2mnn.families.vision import VisionFamily


class Qwen2VL(VisionFamily):
    """Qwen2-VL."""

    model_type = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    width_key = "embed_dim"

    def linear_inputs(self, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, list[int]]:
        """Return the in_features of linear layers; the MLP's width is a ratio here."""
        sizes = super().linear_inputs(text_config, vision_config)
        width = sizes["vision"][0]
        return {**sizes, "vision": [width, int(width * (vision_config.get("mlp_ratio") or 4))]}
