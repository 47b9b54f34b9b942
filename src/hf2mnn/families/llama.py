"""Llama, and Mistral without a sliding window."""

from hf2mnn.families.base import Family


class Llama(Family):
    """Llama 2 and 3, and other models of this architecture."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"


class Mistral(Family):
    """Mistral; its sliding window has no switch, and is on if config.json has no `sliding_window`."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    window_in_all_layers = True
