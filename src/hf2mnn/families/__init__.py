"""What differs between model families: one small file each, and this registry."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.base import Family
from hf2mnn.families.llama import Llama, Mistral
from hf2mnn.families.qwen2 import Qwen2
from hf2mnn.families.qwen2_5_vl import Qwen25VL
from hf2mnn.families.qwen2_vl import Qwen2VL
from hf2mnn.families.qwen3 import Qwen3
from hf2mnn.families.qwen3_vl import Qwen3VL
from hf2mnn.families.smollm3 import SmolLM3
from hf2mnn.families.vision import VisionFamily

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen2(), Qwen3(), Llama(), Mistral(), SmolLM3())
}
NOT_CONVERTED = {"moe": "a mixture of experts", "next": "linear attention", "mamba": "a state space model"}
"""What a part of a model type says of why it is none of them."""


def family_named(model_type: str | None, where: Path) -> Family:
    """The family of a config's `model_type`.

    Raises:
        CheckpointError: for a type that is not converted; the sentence names those that are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        parts = str(model_type).split("_")
        kinds = [kind for part, kind in NOT_CONVERTED.items() if part in parts]
        why = f" ({kinds[0]})" if kinds else ""
        raise CheckpointError(
            f"{where} says model_type {model_type!r}{why}, which is not converted; these are:"
            f" {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "VisionFamily", "family_named"]
