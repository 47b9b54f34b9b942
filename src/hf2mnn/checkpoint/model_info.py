"""Contents of model.json: the properties of a model that stages need after the checkpoint is converted."""

from __future__ import annotations

from typing import Any

from hf2mnn.checkpoint.facts import check_image_settings, image_settings, is_number, stop_ids
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families import VisionFamily

COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def has_vision(info: dict[str, Any]) -> bool:
    """Return whether the model of a model.json has a vision tower."""
    return "image_token_id" in info


def check_model_info(info: dict[str, Any], source: object) -> None:
    """Check types and ranges of all values; `source` names the file in errors."""
    vision = has_vision(info)
    counts = (*COUNTS, "vision_depth") if vision else COUNTS
    for key in (*counts, *(VisionFamily.special_tokens if vision else ())):
        if type(info.get(key)) is not int or not is_number(info[key], 1 if key in counts else 0):
            raise CheckpointError(f"{source} has an invalid {key}: {info.get(key)!r}; download it again")
    if vision:
        check_image_settings(info, source)


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
