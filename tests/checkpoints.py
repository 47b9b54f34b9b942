"""Small checkpoints of every family's architecture, with random weights and the tokenizer of shapes-vl.

Sizes differ wherever they can, so that none can be mistaken for another: heads times head_dim is not the hidden size,
there are one, two or eight query heads for each key-value head, embeddings are tied or not, with or without biases,
with several kinds of rotary positions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support import SHAPES_VL
from synth import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT_IDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
MROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Small(Shape):
    """Checkpoint with settings of the image processor (`images`) and a seed."""

    images: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


def _text(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int | None, **more: Any) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 512}
    return sizes | ({"head_dim": head_dim} if head_dim else {}) | more


SHAPES = {
    "qwen2-vl": Small(
        "qwen2_vl",
        _text(3, 192, 320, 6, 3, None, rope_parameters={**MROPE, "mrope_section": [4, 6, 6]}),
        {"depth": 2, "embed_dim": 96, "num_heads": 3, "hidden_size": 192},
        tied=False,
    ),
    # Windows of 8 x 8 patches in four blocks of six; YaRN scales the rotary positions.
    "qwen2.5-vl": Small(
        "qwen2_5_vl",
        _text(4, 256, 448, 8, 1, None, rope_parameters={**YARN, "mrope_section": [4, 6, 6]}),
        {
            "depth": 6,
            "hidden_size": 96,
            "intermediate_size": 176,
            "num_heads": 3,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [2, 5],
        },
        tied=True,
        seed=1,
    ),
    # Deepstack of three blocks; eight heads of 32 in a hidden size of 192.
    "qwen3-vl": Small(
        "qwen3_vl",
        _text(5, 192, 288, 8, 4, 32, rope_parameters={**MROPE, "mrope_section": [6, 5, 5]}),
        {
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_heads": 3,
            "out_hidden_size": 192,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 2, 3],
        },
        tied=False,
        images={"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    ),
    "qwen2": Small(
        "qwen2", _text(4, 160, 288, 5, 5, None, rope_parameters={**MROPE, "rope_theta": 1e4}), {}, tied=True
    ),
    "qwen3": Small("qwen3", _text(5, 128, 352, 8, 4, 48, rope_parameters=YARN), {}, tied=False),
    # Biases everywhere, as Llama may have them.
    "llama": Small(
        "llama",
        _text(4, 256, 416, 8, 1, 32, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
        {},
        tied=True,
    ),
    "smollm3": Small(
        "smollm3", _text(4, 128, 224, 6, 2, 32, no_rope_layers=[1, 1, 1, 0], rope_parameters=MROPE), {}, tied=True
    ),
    "mistral": Small(
        "mistral", _text(4, 128, 224, 6, 2, 32, sliding_window=None, rope_parameters=LINEAR), {}, tied=False
    ),
}


def configuration(shape: Shape) -> PreTrainedConfig:
    """Return the configuration of transformers, with the vocabulary and special tokens of shapes-vl."""
    stored = json.loads((SHAPES_VL / "config.json").read_text())
    config = replace(shape, text={key: stored["text_config"][key] for key in TEXT_IDS} | shape.text).config()
    for key in IDS if shape.vision else ():
        setattr(config, key, stored[key])
    return config


def make_small(shape: Small, folder: Path) -> Path:
    """Write a checkpoint with bfloat16 weights, large enough that its answers depend on the prompt."""
    import torch
    import transformers

    config = configuration(shape)
    torch.manual_seed(shape.seed)
    model = getattr(transformers, config.architectures[0])(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.6 / parameter[0].numel() ** 0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in COPIED:
        shutil.copyfile(SHAPES_VL / name, folder / name)
    if shape.vision:
        images = json.loads((SHAPES_VL / "preprocessor_config.json").read_text()) | shape.images
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
