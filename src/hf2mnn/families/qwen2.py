"""Qwen2 and Qwen2.5 without image input."""

from hf2mnn.families.base import Family


class Qwen2(Family):
    """Qwen2 and Qwen2.5 without image input."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
