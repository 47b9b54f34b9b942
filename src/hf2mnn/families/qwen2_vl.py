"""Qwen2-VL: a Qwen2 decoder with M-RoPE, and a vision transformer with full attention over the patches of an image."""

from __future__ import annotations

from typing import Any

from hf2mnn.families.vision import VisionFamily


class Qwen2VL(VisionFamily):
    model_type = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    width = "embed_dim"

    def linear_inputs(self, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, list[int]]:
        found = super().linear_inputs(text_config, vision_config)
        width = found["vision"][0]
        return {**found, "vision": [width, int(width * (vision_config.get("mlp_ratio") or 4))]}
