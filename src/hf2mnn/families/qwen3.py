"""Qwen3 without image input: RMSNorm on queries and keys of each head before RoPE."""

from hf2mnn.families.base import Family


class Qwen3(Family):
    """Qwen3 without image input."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
