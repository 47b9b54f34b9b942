"""Llama, and what has its architecture: Mistral without a window."""

from __future__ import annotations

from typing import Any

from hf2mnn.families.base import Family


class Llama(Family):
    model_type = "llama"
    architecture = "LlamaForCausalLM"


class Mistral(Family):
    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def _slides(self, text_config: dict[str, Any]) -> bool:
        return text_config.get("sliding_window", 4096) is not None
