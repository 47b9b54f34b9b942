"""Tests of all families: names of weights, folds, and unsupported features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoints import SHAPES, configuration
from hf2mnn.core.errors import CheckpointError
from hf2mnn.families import FAMILIES, Family, get_family

SOUND = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "sliding_window": None}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_every_family_has_a_small_checkpoint() -> None:
    assert {shape.model_type for shape in SHAPES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("parameter", "legacy"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_proj.bias"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.visual.merger.mlp.2.bias", "visual.merger.mlp.2.bias"),
    ],
)
def test_parameters_have_a_legacy_name(parameter: str, legacy: str) -> None:
    """Published checkpoints of Qwen2-VL and Qwen2.5-VL have the legacy names."""
    for name in ("qwen2_vl", "qwen2_5_vl"):
        assert FAMILIES[name].tensor_names(parameter, tied=True) == [parameter, legacy]


def test_a_tied_lm_head_is_the_embedding_and_an_untied_one_never_is(family: Family) -> None:
    """An untied checkpoint without lm_head must be refused, not run with the embedding."""
    embedding = family.tensor_names(family.embedding, tied=True)
    assert family.tensor_names("lm_head.weight", tied=True) == embedding
    assert family.tensor_names("lm_head.weight", tied=False) == ["lm_head.weight"]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_folds_name_existing_modules(name: str) -> None:
    """A fold of a missing layer would be skipped silently."""
    shape = SHAPES[name]
    family, config = FAMILIES[shape.model_type], configuration(shape)
    text = config.get_text_config()
    facts = {key: getattr(text, key) for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")}
    facts |= {"head_dim": getattr(text, "head_dim", None), "vision_depth": shape.vision.get("depth", 0)}
    with torch.device("meta"):
        modules = dict(getattr(transformers, family.architecture)(config).named_modules())
    folds = family.folds(facts)
    assert len(folds) == 4 * facts["num_hidden_layers"] + 2 * facts["vision_depth"]
    assert {name for fold in folds for name in (fold.smooth_layer, *fold.balance_layers)} <= set(modules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_experts": 8}, r"mixture of experts \(num_experts\)"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "one that is new"}}, "'one that is new'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "invalid rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_features_are_refused(family: Family, text: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family.check({"vision_config": {}}, SOUND | text)


@pytest.mark.parametrize("rope", [{"type": "mrope"}, {"rope_type": "default"}, {"rope_type": "yarn"}, None])
def test_the_rope_parameters_of_published_checkpoints_are_accepted(rope: dict[str, Any] | None) -> None:
    """Published ones have {"type": "mrope"}, newly saved ones "default"; a window that is off may still have a size."""
    config = dict.fromkeys(("image_token_id", "vision_start_token_id", "vision_end_token_id"), 1)
    text = {"rope_parameters": rope, "use_sliding_window": False, "sliding_window": 32768}
    FAMILIES["qwen2_vl"].check({**config, "vision_config": {}}, text)


def test_mistral_has_a_sliding_window_by_default() -> None:
    """Its window has no switch, and is on if config.json has no size."""
    rope = {"rope_parameters": SOUND["rope_parameters"]}
    for text in (rope, rope | {"sliding_window": 4096}):
        with pytest.raises(CheckpointError, match="sliding window"):
            FAMILIES["mistral"].check({}, text)
    FAMILIES["mistral"].check({}, SOUND)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_next", None])
def test_another_model_type_is_refused_with_the_supported_ones(model_type: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*not supported.*llama.*qwen2_vl"):
        get_family(model_type, Path("config.json"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe"])
def test_a_mixture_of_experts_is_refused_by_its_kind(model_type: str) -> None:
    with pytest.raises(CheckpointError, match="mixture of experts"):
        get_family(model_type, Path("config.json"))
