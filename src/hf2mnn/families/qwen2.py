"""Qwen2 and Qwen2.5, text alone."""

from __future__ import annotations

from hf2mnn.families.base import Family


class Qwen2(Family):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
