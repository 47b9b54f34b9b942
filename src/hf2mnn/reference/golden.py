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

from hf2mnn.reference.tap_points import kept_rows

PROBES = "probes"
"""Key of the metadata of ACTIVATIONS: JSON, the example by the kind of the probe."""
PROBED = ("ids", "inputs_embeds", "position_ids", "deepstack_embeds")
"""What a probe holds beside its points."""
EXAMPLES, TENSORS, ACTIVATIONS = "examples.json", "golden.safetensors", "activations.safetensors"


@dataclass(frozen=True)
class GoldenExample:
    """One example with what PyTorch made of it.

    input_ids int64 [n]; position_ids int64 [rows, n]; answer_ids int64 [m], greedy, the stop id included;
    logits float32 [m, vocabulary], row i the one that answer_ids[i] was chosen from. prompt is what the checkpoint's
    template makes of messages. expected and metric are what `hf2mnn.reference.tasks.score_answer` takes.
    """

    id: str
    category: str
    language: str
    expected: list[str] | None
    metric: str
    answer: str
    messages: list[dict[str, Any]]
    prompt: str
    images: list[str]
    input_ids: np.ndarray
    position_ids: np.ndarray
    answer_ids: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class GoldenImage:
    """pixel_values float32 [patches, values]; grid_thw int64 [3]; embeds float32 [rows, hidden] as
    `VisionFamily.as_rows` has them; original and resized uint8 RGB [height, width, 3].
    """

    name: str
    pixel_values: np.ndarray
    grid_thw: np.ndarray
    embeds: np.ndarray
    original: np.ndarray
    resized: np.ndarray


@dataclass(frozen=True)
class GoldenProbe:
    """One example looked at layer by layer: prompt and answer read at once.

    ids int64 [tokens]; inputs_embeds float32 [tokens, hidden], image embeddings among them; position_ids int64 [rows,
    tokens]; deepstack_embeds float32 [layers, tokens, hidden] of a model that has them; points: float32 [kept rows,
    values] by name (`hf2mnn.reference.tap_points`).
    """

    kind: str
    id: str
    images: list[str]
    ids: np.ndarray
    inputs_embeds: np.ndarray
    position_ids: np.ndarray
    points: dict[str, np.ndarray]
    deepstack_embeds: np.ndarray | None = None

    def after_images(self, image_token_id: int | None) -> tuple[list[int], list[int]]:
        """The tokens up to the end of the last image, and those after it."""
        tokens = np.flatnonzero(self.ids == (-1 if image_token_id is None else image_token_id))
        begin = int(tokens[-1]) + 1 if len(tokens) else 0
        return self.ids[:begin].tolist(), self.ids[begin:].tolist()


def without_repeats(ids: np.ndarray, token: int | None) -> np.ndarray:
    """`ids` with each run of `token` as one: how many tokens an image makes is not the tokenizer's doing."""
    follows = np.zeros(len(ids), bool)
    follows[1:] = ids[1:] == ids[:-1]
    return ids if token is None else ids[(ids != token) | ~follows]


def spread_examples(records: list[dict[str, Any]], count: int) -> list[str]:
    """At most `count` ids, evenly over the records as they are sorted by category, so that every kind is there."""
    ordered = sorted(records, key=lambda record: (record["category"], record["id"]))
    return [ordered[place]["id"] for place in kept_rows(len(ordered), count)]


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

    def image_names(self) -> list[str]:
        return sorted({name for record in self.records for name in record["images"]})

    def image(self, name: str) -> GoldenImage:
        arrays = ("pixel_values", "grid_thw", "embeds", "original", "resized")
        return GoldenImage(name, **{array: self._tensor("images", name, array) for array in arrays})

    def probes(self) -> Iterator[GoldenProbe]:
        """The "text" and the "image" probe, those of them that the set has."""
        images = {record["id"]: record["images"] for record in self.records}
        with safe_open(self.folder / ACTIVATIONS, "np") as file:
            for kind, example in sorted(json.loads(file.metadata()[PROBES]).items()):
                names = [name for name in sorted(file.keys()) if name.startswith(f"{kind}/")]
                inside = {name.partition("/")[2]: file.get_tensor(name) for name in names}
                fed = {name: inside.pop(name) for name in PROBED if name in inside}
                yield GoldenProbe(kind, example, images[example], **fed, points=inside)
