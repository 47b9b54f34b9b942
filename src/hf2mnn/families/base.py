"""The questions that every family answers, and the answers that hold for an ordinary decoder.

A family of text alone is a subclass that says what its name is; one that sees is a `VisionFamily`.
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
    """A place where channels can be scaled without a change of what the model computes.

    producer: a normalization, or a linear layer whose outputs are multiplied and never bent. readers: all the linear
    layers that read it. passes: points on the way that are scaled as well. groups, size: with grouped queries, in how
    many runs of `size` channels the readers see each run of the producer.
    """

    producer: str
    readers: tuple[str, ...]
    passes: tuple[str, ...] = ()
    groups: int = 1
    size: int = 0

    def spread(self, scales: np.ndarray) -> np.ndarray:
        """The readers' channels of the producer's."""
        return scales if self.groups == 1 else np.repeat(scales.reshape(-1, self.size), self.groups, axis=0).reshape(-1)

    def gather(self, sizes: np.ndarray) -> np.ndarray:
        """The producer's channels of the readers', as their mean."""
        return sizes if self.groups == 1 else sizes.reshape(-1, self.groups, self.size).mean(axis=1).reshape(-1)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
"""Keys of configurations whose layers choose among several MLPs."""


class Family:
    """A decoder of transformers: where its parts are and what its graph is fed."""

    model_type: str
    architecture: str
    """Name of the class in transformers."""
    sees = False
    """Whether it is a `VisionFamily`."""
    special_tokens: ClassVar[dict[str, str]] = {}
    """Keys of config.json that hold ids, and the tokens whose ids they must be."""
    image_text = ""
    """What the chat template writes for an image, where the model sees."""
    decoder = "model"
    """Module of the decoder without lm_head, by its name in the transformers model."""
    older: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Beginnings of parameters' names, and what older checkpoints have in their place."""
    rows = 1
    """Rows of position ids."""
    deepstack = 0
    """Layers after which the decoder adds what the vision tower has seen on the way."""
    rotary: ClassVar[frozenset[str]] = frozenset({"default", "linear", "llama3", "yarn"})
    """Kinds of rotary positions whose frequencies do not depend on how long the text is."""

    @property
    def embedding(self) -> str:
        """Parameter of the embedding."""
        return f"{self.decoder}.embed_tokens.weight"

    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        """Raise CheckpointError for a feature of the architecture that would be converted wrongly."""
        this = f"this {self.model_type}"
        if experts := [key for key in EXPERTS if text_config.get(key)]:
            raise CheckpointError(f"{this} is a mixture of experts ({experts[0]}), which is not converted")
        kinds = text_config.get("layer_types") or []
        others = sorted({str(kind) for kind in kinds} - {"full_attention"}) if isinstance(kinds, list) else [kinds]
        # A window that is off may still have a size.
        if text_config.get("use_sliding_window") or self._slides(text_config):
            raise CheckpointError(f"{this} uses sliding window attention, which is not converted")
        if others:
            raise CheckpointError(f"{this} has layers of {others[0]}, which are not converted")
        rope = text_config.get("rope_parameters") or text_config.get("rope_scaling") or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise CheckpointError(f"config.json of {this} says {rope!r} of its rotary positions; download it again")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in self.rotary:
            raise CheckpointError(f"{this} scales its rotary positions by {kind!r}, which is not converted")
        if (rope.get("partial_rotary_factor") or text_config.get("partial_rotary_factor") or 1) != 1:
            raise CheckpointError(f"{this} rotates a part of each head (partial_rotary_factor), which is not converted")

    def _slides(self, text_config: dict[str, Any]) -> bool:
        """Whether a window is on that no key switches."""
        return False

    def tensor_names(self, parameter: str, tied: bool) -> list[str]:
        """Names, newest first, under which checkpoints have stored a parameter of the transformers model."""
        if parameter == "lm_head.weight":
            return self.tensor_names(self.embedding, tied) if tied else ["lm_head.weight"]
        for new, old in self.older:
            if parameter.startswith(new):
                return [parameter, old + parameter.removeprefix(new)]
        return [parameter]

    def language_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The decoder without lm_head: takes inputs_embeds, attention_mask, position_ids, past_key_values."""
        return model.get_submodule(self.decoder)

    def prepare(self, model: torch.nn.Module) -> None:
        """Before it is traced, give a model in place of what MNN cannot take what computes the same bits."""

    def position_ids(self, input_ids: np.ndarray, grids: list[np.ndarray], model: dict[str, Any]) -> np.ndarray:
        """int64 [rows, tokens]: 3 rows with M-RoPE, 1 without; `grids` holds one grid_thw an image, `model` is
        model.json.
        """
        return np.arange(len(input_ids), dtype=np.int64)[None]

    def facts(self, config: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
        """What model.json says of this family beside the decoder's sizes; `images` is preprocessor_config.json."""
        return {}

    def engine_config(self, model: dict[str, Any]) -> dict[str, Any]:
        """This family's own keys of llm_config.json, from the facts in model.json."""
        return {"is_visual": False, "is_mrope": self.rows == 3}

    def linear_inputs(self, text_config: dict[str, Any], vision_config: dict[str, Any]) -> dict[str, list[int]]:
        """Numbers of inputs of the linear layers by part, 0 where the configuration does not say."""
        return {"decoder": [int(text_config.get(key) or 0) for key in ("hidden_size", "intermediate_size")]}

    def folds(self, model: dict[str, Any]) -> list[Fold]:
        """Where channels can be scaled; `model` is model.json. Of the decoder: normalizations and what reads them,
        values and the output projection, up and down.
        """
        group, found = model["num_attention_heads"] // model["num_key_value_heads"], []
        for index in range(model["num_hidden_layers"]):
            layer = f"{self.decoder}.layers.{index}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            projections = tuple(f"{attention}.{name}_proj" for name in "qkv")
            found += [
                Fold(f"{layer}.input_layernorm", projections),
                Fold(
                    f"{attention}.v_proj", (f"{attention}.o_proj",), (f"{attention}.context",), group, model["head_dim"]
                ),
                Fold(f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
                Fold(f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
            ]
        return found
