"""The facts about a model that outlive its checkpoint: model.json of the `onnx` stage."""

from __future__ import annotations

import math
from typing import Any

from hf2mnn.errors import SourceError
from hf2mnn.source.checkpoint import Checkpoint

# What transformers' Qwen2VLImageProcessor takes where preprocessor_config.json leaves it out.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("patch_size", "temporal_patch_size", "merge_size", "vision_depth"),
)
IDS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
MOST = (1 << 31) - 1
"""Sizes and ids are 32-bit integers in MNN."""


def _number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= MOST


def check_facts(facts: dict[str, Any], where: object) -> None:
    """Raises SourceError for a fact that is no such number; `where` says so."""

    def refuse(key: str) -> SourceError:
        return SourceError(f"{where} says {key} {facts.get(key)!r}, which cannot be; download it again")

    for key in (*COUNTS, *IDS):
        if type(facts.get(key)) is not int or not _number(facts[key], 1 if key in COUNTS else 0):
            raise refuse(key)
    for key in ("min_pixels", "max_pixels"):
        if facts.get(key) is not None and not _number(facts[key], 0):
            raise refuse(key)
    for key, least in (("image_mean", -MOST), ("image_std", 1e-6)):
        values = facts.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(_number(value, least) for value in values):
            raise refuse(key)


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What model.json says; every later stage reads this instead of the configuration.

    Raises:
        SourceError: the configuration lacks one, or says what cannot be.
    """
    facts = _facts(checkpoint)
    check_facts(facts, f"the configuration in {checkpoint.folder}")
    return facts


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config, text, images = checkpoint.config, checkpoint.text_config, checkpoint.image_settings
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    divides = type(heads) is int and type(hidden) is int and heads > 0
    size = images.get("size")
    size = size if isinstance(size, dict) else {}
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
        "image_token_id": config.get("image_token_id"),
        "vision_start_token_id": config.get("vision_start_token_id"),
        "vision_end_token_id": config.get("vision_end_token_id"),
        "patch_size": images.get("patch_size", 14),
        "temporal_patch_size": images.get("temporal_patch_size", 2),
        "merge_size": images.get("merge_size", 2),
        "vision_depth": (config.get("vision_config") or {}).get("depth", 32),
        "image_mean": images.get("image_mean", CLIP_MEAN),
        "image_std": images.get("image_std", CLIP_STD),
        "min_pixels": images.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        "max_pixels": images.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
    }
