"""The facts about a model that outlive its checkpoint: model.json of the `onnx` stage."""

from __future__ import annotations

from typing import Any

from hf2mnn.source.checkpoint import Checkpoint

# What transformers' Qwen2VLImageProcessor takes where preprocessor_config.json leaves it out.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What model.json says; every later stage reads this instead of the configuration."""
    config, text, images = checkpoint.config, checkpoint.text_config, checkpoint.image_settings
    heads = text["num_attention_heads"]
    size = images.get("size") or {}
    return {
        "model_type": config["model_type"],
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "num_hidden_layers": text["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or text["hidden_size"] // heads,
        "tie_word_embeddings": checkpoint.tied,
        "stop_ids": checkpoint.stop_ids,
        "image_token_id": config["image_token_id"],
        "vision_start_token_id": config["vision_start_token_id"],
        "vision_end_token_id": config["vision_end_token_id"],
        "patch_size": images.get("patch_size", 14),
        "temporal_patch_size": images.get("temporal_patch_size", 2),
        "merge_size": images.get("merge_size", 2),
        "vision_depth": config["vision_config"].get("depth", 32),
        "image_mean": images.get("image_mean", CLIP_MEAN),
        "image_std": images.get("image_std", CLIP_STD),
        "min_pixels": images.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        "max_pixels": images.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
    }
