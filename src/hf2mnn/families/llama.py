"""Llama, and Mistral without a sliding window."""

from __future__ import annotations

from typing import Any

from hf2mnn.families.base import Family


class Llama(Family):
    """Llama 2 and 3, and other models of this architecture."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"


class Mistral(Family):
    """Mistral; its sliding window has no switch, and is on if config.json has no `sliding_window`."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def _uses_sliding_window(self, text_config: dict[str, Any]) -> bool:
        return super()._uses_sliding_window(text_config) or text_config.get("sliding_window", 4096) is not None
