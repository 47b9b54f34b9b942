"""Contents of model.json: the properties of a model that stages need after the checkpoint is converted."""

from __future__ import annotations

import math
from typing import Any

from hf2mnn.checkpoint.facts import image_settings, stop_ids
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families import VisionFamily

COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
VISION_COUNTS = ("patch_size", "temporal_patch_size", "merge_size", "vision_depth")
INT32_MAX = (1 << 31) - 1
"""MNN stores sizes and ids as 32-bit integers."""


def has_vision(info: dict[str, Any]) -> bool:
    """Return whether the model of a model.json has a vision tower."""
    return "image_token_id" in info


def _is_number(value: Any, minimum: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and minimum <= value <= INT32_MAX


def check_model_info(info: dict[str, Any], source: object) -> None:
    """Check types and ranges of all values; `source` names the file in errors."""

    def invalid(key: str) -> CheckpointError:
        return CheckpointError(f"{source} has an invalid {key}: {info.get(key)!r}; download it again")

    vision = has_vision(info)
    counts = (*COUNTS, *VISION_COUNTS) if vision else COUNTS
    for key in (*counts, *(VisionFamily.special_tokens if vision else ())):
        if type(info.get(key)) is not int or not _is_number(info[key], 1 if key in counts else 0):
            raise invalid(key)
    for key in ("min_pixels", "max_pixels"):
        if vision and not _is_number(info.get(key), 1):
            raise invalid(key)
    for key, minimum in (("image_mean", -INT32_MAX), ("image_std", 1e-6)) if vision else ():
        values = info.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(_is_number(value, minimum) for value in values):
            raise invalid(key)


def model_info(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the contents of model.json for a checkpoint; CheckpointError for a missing or invalid value."""
    from hf2mnn.checkpoint.architecture import load_settings  # loads torch, which takes seconds

    (config, text), family = load_settings(checkpoint), checkpoint.family
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    divisible = type(heads) is int and type(hidden) is int and heads > 0
    info = {
        "model_type": config["model_type"],
        **{key: text.get(key) for key in COUNTS},
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or (hidden // heads if divisible else None),
        "tie_word_embeddings": checkpoint.tied,
        "stop_ids": stop_ids(checkpoint.folder),
        **family.model_info(config),
        **(image_settings(checkpoint.folder) if family.has_vision else {}),
    }
    check_model_info(info, f"the configuration in {checkpoint.folder}")
    return info
