"""What differs between model families: one small file each, and this registry."""

from __future__ import annotations

from pathlib import Path

from hf2mnn.errors import SourceError
from hf2mnn.families.base import Family
from hf2mnn.families.qwen2_vl import Qwen2VL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen2VL(),)}


def family_named(model_type: str | None, where: Path) -> Family:
    """The family of a config's `model_type`.

    Raises:
        SourceError: for a type that is not converted; the sentence names those that are.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SourceError(
            f"{where} says model_type {model_type!r}, which is not converted; these are: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "family_named"]
