"""Model families: one file for each architecture, and their registry."""

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
UNSUPPORTED_KINDS = {"moe": "a mixture of experts", "next": "linear attention", "mamba": "a state space model"}
"""Kinds of architectures by a part of their model type."""


def get_family(model_type: str | None, path: Path) -> Family:
    """Return the family of a `model_type`, or raise CheckpointError; `path` is the file that it was read from."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        parts = str(model_type).split("_")
        kind = next((f" ({kind})" for part, kind in UNSUPPORTED_KINDS.items() if part in parts), "")
        raise CheckpointError(
            f"{path} has model_type {model_type!r}{kind}, which is not supported; choose a model of one of these types:"
            f" {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "VisionFamily", "get_family"]
