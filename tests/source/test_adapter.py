"""A LoRA adapter merged into a checkpoint: against PEFT's own model with the adapter, and what is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf2mnn.manifest import Manifest
from hf2mnn.source.checkpoint import Checkpoint
from hf2mnn.source.fetch import AdapterPlace, fetch_source
from hf2mnn.source.model import load_model
from support import TEXT, VISION

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYWHERE = r".*(_proj|qkv|attn\.proj|fc1|fc2|mlp\.0|mlp\.2)"
"""Every linear layer but lm_head."""


@dataclass(frozen=True)
class Kind:
    """An adapter's settings for PEFT, and whether the model's embedding is its lm_head."""

    settings: dict[str, Any]
    tied: bool = False


KINDS = {
    "decoder": Kind({"target_modules": DECODER, "lora_alpha": 5}, tied=True),
    "every linear layer": Kind(
        {"target_modules": EVERYWHERE, "r": 6, "use_rslora": True, "init_lora_weights": "gaussian"}
    ),
    "patterns": Kind(
        {
            "target_modules": DECODER,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn.*": 7},
            "alpha_pattern": {"down_proj": 1, r"model.*\.0\.mlp\.up_proj": 40},
        }
    ),
    "saved modules": Kind({"target_modules": ["qkv", "v_proj"], "modules_to_save": ["lm_head", "merger"]}),
    "DoRA": Kind({"target_modules": EVERYWHERE, "use_dora": True}),
    "biases": Kind({"target_modules": ["q_proj", "proj"][:1], "bias": "all"}),
    "biases of its layers": Kind({"target_modules": ["q_proj", "qkv"], "bias": "lora_only"}),
    "embedding and lm_head": Kind({"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "embedding of a tied model": Kind({"target_modules": ["embed_tokens"]}, tied=True),
    "lm_head of a tied model": Kind({"target_modules": ["lm_head"], "use_dora": True}, tied=True),
    "saved lm_head of a tied model": Kind({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, tied=True),
    "both ends tied": Kind(
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied=True
    ),
}


@pytest.fixture(scope="module")
def bases(make_checkpoint: Callable[..., Path]) -> dict[bool, Path]:
    return {tied: make_checkpoint(text=TEXT, vision=VISION, tied=tied) for tied in (False, True)}


def train(base: Path, settings: dict[str, Any], folder: Path) -> PeftModel:
    """A PEFT model of the base in float32 whose adapter is random in every part, saved to `folder` by PEFT."""
    model = load_model(Checkpoint(base))
    model.config._name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**{"r": 4, **settings}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    spread = 0.2 if "lora_embedding" in name or "lora_A" in name or "lora_B" in name else 0.1
                    parameter.add_(torch.randn_like(parameter) * spread)
        model.save_pretrained(folder)
    return model.eval()


def feed(model: torch.nn.Module) -> torch.Tensor:
    """float32 [tokens, vocabulary]: logits of a text with a picture."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (1, 20), generator=generator)
    ids[0, 3], ids[0, 4:10], ids[0, 10] = (
        config.vision_start_token_id,
        config.image_token_id,
        config.vision_end_token_id,
    )
    pixels = torch.randn(24, 1176, generator=generator)
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == config.image_token_id).int(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 4, 6]]),
        ).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_the_model_with_the_adapter(kind: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    described = KINDS[kind]
    base = bases[described.tied]
    wanted = feed(train(base, described.settings, tmp_path / "adapter"))
    plain = feed(load_model(Checkpoint(base)))
    source = fetch_source(tmp_path / "source", base, adapter=AdapterPlace(tmp_path / "adapter"))
    Manifest.load(source).verify()
    found = feed(load_model(Checkpoint(source)))
    change = (wanted - plain).abs().max()
    print(kind, float(change), float((found - wanted).abs().max()), float(wanted.abs().max()))
    assert change > 0.05
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
