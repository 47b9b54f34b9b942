"""The questions that every family answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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


class Family(ABC):
    """A model architecture of transformers: where its parts are and what its graphs are fed."""

    model_type: str
    architecture: str
    """Name of the class in transformers."""
    image_text: str
    """What the chat template writes for a picture."""
    special_tokens: dict[str, str]
    """Keys of config.json that hold ids, and the tokens whose ids they must be."""

    @abstractmethod
    def check(self, config: dict[str, Any], text_config: dict[str, Any]) -> None:
        """Raise SourceError for a feature of the architecture that would be converted wrongly."""

    @abstractmethod
    def tensor_names(self, parameter: str, tied: bool) -> list[str]:
        """Names, newest first, under which checkpoints have stored a parameter of the transformers model."""

    @abstractmethod
    def language_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The decoder without lm_head: takes inputs_embeds, attention_mask, position_ids, past_key_values."""

    @abstractmethod
    def vision_tower(self, model: torch.nn.Module, attention: Callable[..., torch.Tensor]) -> torch.nn.Module:
        """The vision tower and projector as one module, called with the tensors of `vision_inputs`, in that order;
        gives float32 [image tokens, hidden]. Its attention is computed by `attention(query, key, value, mask, scale)`:
        [1, heads, n, head size] each, gives [1, n, heads, head size]."""

    @abstractmethod
    def vision_inputs(self, pixel_values: np.ndarray, grid_thw: np.ndarray, merge_size: int) -> dict[str, np.ndarray]:
        """Inputs of the vision graph for one picture, by name, in the order in which MNN's engine feeds them."""

    @abstractmethod
    def vision_axes(self) -> dict[str, dict[int, str]]:
        """Dynamic axes of those inputs."""

    @abstractmethod
    def position_ids(
        self, input_ids: np.ndarray, grids: list[np.ndarray], image_token_id: int, merge_size: int
    ) -> np.ndarray:
        """int64 [rows, tokens]: 3 rows with M-RoPE, 1 without; `grids` holds one grid_thw a picture."""

    @abstractmethod
    def picture_size(self, width: int, height: int, model: dict[str, Any]) -> tuple[int, int]:
        """(width, height) to which the checkpoint's processor resizes a picture; `model` is model.json."""

    @abstractmethod
    def engine_config(self, model: dict[str, Any]) -> dict[str, Any]:
        """This family's own keys of llm_config.json, from the facts in model.json."""

    @abstractmethod
    def folds(self, model: dict[str, Any]) -> list[Fold]:
        """Where channels can be scaled; `model` is model.json."""
