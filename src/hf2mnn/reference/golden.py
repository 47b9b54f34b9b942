"""The stored reference: inputs and answers by name, read as numpy arrays, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

EXAMPLES, TENSORS = "examples.json", "golden.safetensors"


@dataclass(frozen=True)
class GoldenExample:
    """One example with what PyTorch made of it.

    input_ids int64 [n]; position_ids int64 [rows, n]; answer_ids int64 [m], greedy, the stop id included;
    logits float32 [m, vocabulary], row i the one that answer_ids[i] was chosen from.
    """

    id: str
    category: str
    language: str
    expected: str | None
    answer: str
    prompt: str
    pictures: list[str]
    input_ids: np.ndarray
    position_ids: np.ndarray
    answer_ids: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class GoldenPicture:
    """pixel_values float32 [patches, values]; grid_thw int64 [3]; embeds float32 [image tokens, hidden];
    original and resized uint8 RGB [height, width, 3]."""

    name: str
    pixel_values: np.ndarray
    grid_thw: np.ndarray
    embeds: np.ndarray
    original: np.ndarray
    resized: np.ndarray


class Golden:
    """The folder of the `reference` stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file = safe_open(self.folder / TENSORS, "np")

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / EXAMPLES).read_text(encoding="utf-8"))

    def _tensor(self, *name: str) -> np.ndarray:
        return self._file.get_tensor("/".join(name))

    def examples(self) -> Iterator[GoldenExample]:
        for record in self.records:
            arrays = ("input_ids", "position_ids", "answer_ids", "logits")
            yield GoldenExample(**record, **{name: self._tensor("examples", record["id"], name) for name in arrays})

    def picture_names(self) -> list[str]:
        return sorted({name for record in self.records for name in record["pictures"]})

    def picture(self, name: str) -> GoldenPicture:
        arrays = ("pixel_values", "grid_thw", "embeds", "original", "resized")
        return GoldenPicture(name, **{array: self._tensor("pictures", name, array) for array in arrays})
