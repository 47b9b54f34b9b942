"""Qwen3, text alone: queries and keys are normalized head by head before they are rotated."""

from __future__ import annotations

from hf2mnn.families.base import Family


class Qwen3(Family):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
