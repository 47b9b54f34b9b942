"""Tests of all families: names of weights, folds, and unsupported features."""

from __future__ import annotations

from contextlib import nullcontext
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
    """Published ones have {"type": "mrope"}, newly saved ones "default"."""
    FAMILIES["qwen2_vl"].check({"vision_config": {}}, SOUND | {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("model_type", "settings", "windowed"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, True),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, False),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64, "no_rope_layers": [1, 0]}, True),
        ("smollm3", {"use_sliding_window": True, "sliding_window": None}, False),
        ("mistral", {}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": None}, False),
        ("llama", {"sliding_window": 64}, False),
    ],
)
def test_a_window_matters_only_in_layers_that_transformers_gives_one(
    model_type: str, settings: dict[str, Any], windowed: bool
) -> None:
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=2, **settings).to_dict()
    with pytest.raises(CheckpointError, match="sliding_attention") if windowed else nullcontext():
        FAMILIES[model_type].check(config, config)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_next", None])
def test_another_model_type_is_refused_with_the_supported_ones(model_type: str | None) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*not supported.*llama.*qwen2_vl"):
        get_family(model_type, Path("config.json"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe"])
def test_a_mixture_of_experts_is_refused_by_its_kind(model_type: str) -> None:
    with pytest.raises(CheckpointError, match="mixture of experts"):
        get_family(model_type, Path("config.json"))
