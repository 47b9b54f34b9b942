"""Read the stored reference: inputs and golden outputs as numpy arrays, loaded one example at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from hf2mnn.reference.tap_points import evenly_spaced

EXAMPLES, TENSORS, ACTIVATIONS = "examples.json", "golden.safetensors", "activations.safetensors"
PROBES = "probes"
"""Key in the metadata of ACTIVATIONS: JSON object from the kind of a probe to its example."""
PROBE_INPUTS = ("ids", "inputs_embeds", "position_ids", "deepstack_embeds")
"""Tensors of a probe that are no tap points."""


@dataclass(frozen=True)
class GoldenExample:
    """Example with the reference's answer.

    Attributes:
        expected: Accepted answers; None for an example without labels.
        metric: Metric of `hf2mnn.reference.tasks` that compares the answer with `expected`.
        prompt: Messages as the checkpoint's chat template renders it.
        input_ids: Token ids of the prompt, int64 [n].
        position_ids: int64 [position_rows, n].
        answer_ids: Greedy answer with its stop id, int64 [m].
        logits: float32 [m, vocabulary]; row i is the one whose argmax is answer_ids[i].
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
    """Image with the reference's preprocessing and embeddings.

    Attributes:
        pixel_values: float32 [patches, values].
        grid_thw: int64 [3].
        embeds: Outputs of the vision tower, float32 [rows, hidden], as `VisionFamily.concat_outputs` joins them.
        original: uint8 RGB [height, width, 3].
        resized: uint8 RGB [height, width, 3], as the image processor resizes it.
    """

    name: str
    pixel_values: np.ndarray
    grid_thw: np.ndarray
    embeds: np.ndarray
    original: np.ndarray
    resized: np.ndarray


@dataclass(frozen=True)
class GoldenProbe:
    """Example with its tap points: one forward call over prompt and answer.

    Attributes:
        kind: "text" or "image".
        ids: int64 [tokens].
        inputs_embeds: float32 [tokens, hidden], with image embeddings.
        position_ids: int64 [position_rows, tokens].
        tap_points: float32 [stored rows, values] by name (`hf2mnn.reference.tap_points`).
        deepstack_embeds: float32 [layers, tokens, hidden]; None without deepstack.
    """

    kind: str
    id: str
    images: list[str]
    ids: np.ndarray
    inputs_embeds: np.ndarray
    position_ids: np.ndarray
    tap_points: dict[str, np.ndarray]
    deepstack_embeds: np.ndarray | None = None

    def split_after_images(self, image_token_id: int | None) -> tuple[list[int], list[int]]:
        """Return the tokens up to the end of the last image, and the tokens after it."""
        tokens = np.flatnonzero(self.ids == (-1 if image_token_id is None else image_token_id))
        end = int(tokens[-1]) + 1 if len(tokens) else 0
        return self.ids[:end].tolist(), self.ids[end:].tolist()


def collapse_repeats(ids: np.ndarray, token: int | None) -> np.ndarray:
    """Reduce each run of `token` to one: the number of tokens of an image does not depend on the tokenizer."""
    repeated = np.zeros(len(ids), bool)
    repeated[1:] = ids[1:] == ids[:-1]
    return ids if token is None else ids[(ids != token) | ~repeated]


def sample_examples(records: list[dict[str, Any]], count: int) -> list[str]:
    """Return at most `count` ids, evenly spaced in the order of categories, so that every category is covered."""
    ordered = sorted(records, key=lambda record: (record["category"], record["id"]))
    return [ordered[index]["id"] for index in evenly_spaced(len(ordered), count)]


class Golden:
    """Folder of the `reference` stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._file = safe_open(self.folder / TENSORS, "np")

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Contents of examples.json."""
        return json.loads((self.folder / EXAMPLES).read_text(encoding="utf-8"))

    def _tensor(self, *name: str) -> np.ndarray:
        return self._file.get_tensor("/".join(name))

    def examples(self) -> Iterator[GoldenExample]:
        """Yield all examples, in the order of the evaluation set."""
        for record in self.records:
            arrays = ("input_ids", "position_ids", "answer_ids", "logits")
            yield GoldenExample(**record, **{name: self._tensor("examples", record["id"], name) for name in arrays})

    def image_names(self) -> list[str]:
        """Return the file names of all images, sorted."""
        return sorted({name for record in self.records for name in record["images"]})

    def image(self, name: str) -> GoldenImage:
        """Load an image by its file name."""
        arrays = ("pixel_values", "grid_thw", "embeds", "original", "resized")
        return GoldenImage(name, **{array: self._tensor("images", name, array) for array in arrays})

    def probes(self) -> Iterator[GoldenProbe]:
        """Yield the "image" and the "text" probe; a set without such an example has no such probe."""
        images = {record["id"]: record["images"] for record in self.records}
        with safe_open(self.folder / ACTIVATIONS, "np") as file:
            for kind, example in sorted(json.loads(file.metadata()[PROBES]).items()):
                names = [name for name in sorted(file.keys()) if name.startswith(f"{kind}/")]
                tensors = {name.partition("/")[2]: file.get_tensor(name) for name in names}
                inputs = {name: tensors.pop(name) for name in PROBE_INPUTS if name in tensors}
                yield GoldenProbe(kind, example, images[example], **inputs, tap_points=tensors)
