"""Base class of model families, with the defaults of a text-only decoder.

A text-only family is a subclass with a name; a family with image input derives from `VisionFamily`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hf2mnn.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Fold:
    """Layers between which channel scales can be moved without changing the model's output, as AWQ does.

    With grouped-query attention, each run of `head_dim` output channels of `smooth_layer` occurs in the input of
    `balance_layers` once for each query head of a key-value head: `repeats` times.
    """

    smooth_layer: str  # normalization, or linear layer whose output only passes through linear operators
    balance_layers: tuple[str, ...]  # all linear layers that consume the output of smooth_layer
    tap_points: tuple[str, ...] = ()  # between them, scaled too
    repeats: int = 1
    head_dim: int = 0

    def expand(self, scales: np.ndarray) -> np.ndarray:
        """Map output channels of `smooth_layer` to input channels of `balance_layers`."""
        if self.repeats == 1:
            return scales
        return np.repeat(scales.reshape(-1, self.head_dim), self.repeats, axis=0).reshape(-1)

    def reduce(self, magnitudes: np.ndarray) -> np.ndarray:
        """Map input channels of `balance_layers` to output channels of `smooth_layer` by their mean."""
        if self.repeats == 1:
            return magnitudes
        return magnitudes.reshape(-1, self.repeats, self.head_dim).mean(axis=1).reshape(-1)


EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
"""Keys of config.json that mark a mixture of experts."""


class Family:
    """Architecture of transformers: module names, parameter names and graph inputs."""

    model_type: str
    architecture: str  # class name in transformers
    has_vision = False
    special_tokens: ClassVar[dict[str, str]] = {}  # tokens whose ids config.json must hold, by key
    image_placeholder = ""  # text that the chat template writes for an image
    image_token = video_token = ""  # text of the tokens for which transformers puts media, whoever wrote them
    decoder = "model"  # module without lm_head
    position_rows = 1  # rows of the position ids: 3 with M-RoPE
    deepstack_layers = 0  # decoder layers after which features of the vision tower are added (Qwen3-VL)
    window_in_all_layers = False  # a sliding window has no layer_types (Mistral)
    # Types whose frequencies do not depend on the sequence length.
    rope_types: ClassVar[frozenset[str]] = frozenset({"default", "linear", "llama3", "yarn"})

    @property
    def embedding(self) -> str:
        """Parameter name of the token embedding."""
        return f"{self.decoder}.embed_tokens.weight"

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        """Raise CheckpointError if the model has a feature that would be converted wrongly.

        `config` and `text_config` are the settings that transformers has for the model and for its decoder.
        """
        if experts := [key for key in EXPERT_KEYS if text_config.get(key)]:
            raise self._unsupported(f"a mixture of experts ({experts[0]})")
        types = set(text_config.get("layer_types") or ())
        if self.window_in_all_layers and text_config.get("sliding_window") is not None:
            types.add("sliding_attention")
        if others := sorted(types - {"full_attention"}):
            raise self._unsupported(f"layers of type {others[0]!r}")
        rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise self._faulty_config(f"an invalid rope_parameters: {rope!r}")
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type not in self.rope_types:
            raise self._unsupported(f"rope_type {rope_type!r}")
        if (rotated := rope.get("partial_rotary_factor") or text_config.get("partial_rotary_factor") or 1) != 1:
            raise self._unsupported(f"partial_rotary_factor {rotated}")

    def _unsupported(self, feature: str) -> CheckpointError:
        return CheckpointError(
            f"this {self.model_type} checkpoint has {feature}, which is not supported; choose another checkpoint"
        )

    def _faulty_config(self, fault: str) -> CheckpointError:
        return CheckpointError(f"config.json of this {self.model_type} checkpoint has {fault}; download it again")

    def language_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the decoder without lm_head."""
        return model.get_submodule(self.decoder)

    def prepare(self, model: torch.nn.Module) -> None:
        """Replace modules that MNN cannot convert with bit-identical equivalents, before tracing."""

    def position_ids(self, input_ids: np.ndarray, grids: list[np.ndarray], info: dict[str, Any]) -> np.ndarray:
        """Return position ids, int64 [position_rows, tokens], of a prompt that starts at position 0.

        `input_ids` are int64 [tokens]; `grids` has the grid_thw, int64 [3], of each image; `info` is model.json.
        """
        return np.arange(len(input_ids), dtype=np.int64)[None]

    def model_info(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the family's entries of model.json, from config.json."""
        return {}

    def engine_config(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return the family's entries of llm_config.json, from model.json."""
        return {"is_visual": False, "is_mrope": self.position_rows == 3}

    def linear_inputs(self, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, list[int]]:
        """Return the in_features of linear layers by graph; 0 for sizes that the configuration lacks."""
        return {"decoder": [int(text_config.get(key) or 0) for key in ("hidden_size", "intermediate_size")]}

    def folds(self, info: dict[str, Any]) -> list[Fold]:
        """Return the folds of all decoder layers: two normalizations, v_proj to o_proj, and up_proj to down_proj."""
        repeats, folds = info["num_attention_heads"] // info["num_key_value_heads"], []
        for index in range(info["num_hidden_layers"]):
            layer = f"{self.decoder}.layers.{index}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            output, context = (f"{attention}.o_proj",), (f"{attention}.context",)
            folds += [
                Fold(f"{layer}.input_layernorm", tuple(f"{attention}.{name}_proj" for name in "qkv")),
                Fold(f"{attention}.v_proj", output, context, repeats, info["head_dim"]),
                Fold(f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
                Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
            ]
        return folds
