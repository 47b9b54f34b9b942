"""SmolLM3: every fourth layer leaves its queries and keys where they are (no rotary positions)."""

from __future__ import annotations

from hf2mnn.families.base import Family


class SmolLM3(Family):
    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
