"""The facts about a model that outlive its checkpoint: model.json of the `onnx` stage."""

from __future__ import annotations

import math
from typing import Any

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families.vision import IDS

COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
IMAGE_COUNTS = ("patch_size", "temporal_patch_size", "merge_size", "vision_depth")
MOST = (1 << 31) - 1
"""Sizes and ids are 32-bit integers in MNN."""


def _number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= MOST


def sees(facts: dict[str, Any]) -> bool:
    """Whether the model has a vision tower."""
    return "image_token_id" in facts


def check_facts(facts: dict[str, Any], where: object) -> None:
    """Raises CheckpointError for a fact that is no such number; `where` says so."""

    def refuse(key: str) -> CheckpointError:
        return CheckpointError(f"{where} says {key} {facts.get(key)!r}, which cannot be; download it again")

    seeing = sees(facts)
    counts = (*COUNTS, *IMAGE_COUNTS) if seeing else COUNTS
    for key in (*counts, *(IDS if seeing else ())):
        if type(facts.get(key)) is not int or not _number(facts[key], 1 if key in counts else 0):
            raise refuse(key)
    for key in ("min_pixels", "max_pixels"):
        if facts.get(key) is not None and not _number(facts[key], 0):
            raise refuse(key)
    for key, least in (("image_mean", -MOST), ("image_std", 1e-6)) if seeing else ():
        values = facts.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(_number(value, least) for value in values):
            raise refuse(key)


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What model.json says; every later stage reads this instead of the configuration.

    Raises:
        CheckpointError: the configuration lacks one, or says what cannot be.
    """
    facts = _facts(checkpoint)
    check_facts(facts, f"the configuration in {checkpoint.folder}")
    return facts


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config, text = checkpoint.config, checkpoint.text_config
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    divides = type(heads) is int and type(hidden) is int and heads > 0
    return {
        "model_type": config["model_type"],
        "vocab_size": text.get("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": text.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or (hidden // heads if divides else None),
        "tie_word_embeddings": checkpoint.tied,
        "stop_ids": checkpoint.stop_ids,
        **checkpoint.family.facts(config, checkpoint.image_settings),
    }
