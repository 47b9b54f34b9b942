"""SmolLM3: every fourth layer has no rotary positions."""

from hf2mnn.families.base import Family


class SmolLM3(Family):
    """SmolLM3."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
