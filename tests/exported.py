"""Small Qwen2-VL checkpoints that differ in every size, in PyTorch and as exported graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from hf2mnn.onnx.session import OnnxModel


def full(layers: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}


def rope(*section: int, theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"mrope_section": list(section), "rope_theta": theta, "rope_type": "default"}}


# One and two query heads for each key-value head. "1to1" has a vocabulary larger than the tokenizer's, as published
# checkpoints have, and so few layers that all are traced; of "2to1" three are traced and copied.
SHAPES: dict[str, dict[str, Any]] = {
    "1to1": {
        "text": {
            **full(2),
            **rope(4, 6, 6),
            "hidden_size": 128,
            "intermediate_size": 208,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 704,
        },
        "vision": {"depth": 1, "embed_dim": 96, "num_heads": 3},
        "tied": False,
    },
    "2to1": {
        "text": {
            **full(5),
            **rope(8, 12, 12, theta=1e6),
            "hidden_size": 384,
            "intermediate_size": 320,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
        },
        "vision": {"depth": 4, "embed_dim": 160, "num_heads": 5, "mlp_ratio": 2},
        "tied": True,
    },
}


@dataclass(frozen=True)
class Exported:
    """Folder with a checkpoint as transformers saves it, and its fetch and export stages."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "saved"

    @property
    def source(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def onnx(self) -> Path:
        return self.folder / "onnx"

    @cached_property
    def torch(self) -> Qwen2VLForConditionalGeneration:
        return Qwen2VLForConditionalGeneration.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    @cached_property
    def runtime(self) -> OnnxModel:
        return OnnxModel(self.onnx, threads=1)
