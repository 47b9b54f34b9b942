"""Read the stored reference: inputs and golden outputs as numpy arrays, loaded one example at a time.

Tap points are named intermediate tensors at which PyTorch, ONNX Runtime and MNN are compared: the output of each module
with a weight and of each block, and of each attention `.query` and `.key` after RoPE and `.context` before the output
projection. Their names are those of modules in the transformers model: `hf2mnn.onnx.tap_points` gives them to values of
the ONNX graphs, and MNN's converter keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

EXAMPLES, TENSORS, ACTIVATIONS = "examples.json", "golden.safetensors", "activations.safetensors"
PROBES = "probes"  # key in the metadata of ACTIVATIONS: JSON object from the kind of a probe to its example
PROBE_INPUTS = ("ids", "inputs_embeds", "position_ids", "deepstack_embeds")  # tensors of a probe that are no tap points
MAX_ROWS = 32  # rows (tokens or patches) stored of each tap point; few enough for models of any size


@dataclass(frozen=True)
class GoldenExample:
    """Example with the reference's answer."""

    id: str
    category: str
    language: str
    expected: list[str] | None  # None for an example without labels
    metric: str  # of `hf2mnn.reference.tasks`
    answer: str
    messages: list[dict[str, Any]]
    prompt: str  # messages as rendered by the chat template
    images: list[str]
    input_ids: np.ndarray  # of the prompt, int64 [n]
    position_ids: np.ndarray  # int64 [position_rows, n]
    answer_ids: np.ndarray  # greedy answer with its stop id, int64 [m]
    logits: np.ndarray  # float32 [m, vocabulary]; the argmax of row i is answer_ids[i]


@dataclass(frozen=True)
class ImageInput:
    """Image as the image processor returns it."""

    pixel_values: np.ndarray  # float32 [patches, values]
    grid_thw: np.ndarray  # int64 [3]: frames, and rows and columns of patches
    resized: np.ndarray  # uint8 RGB [height, width, 3]


@dataclass(frozen=True)
class GoldenImage(ImageInput):
    """Image with the reference's embeddings."""

    embeds: np.ndarray  # outputs of the vision tower, joined by `VisionFamily.concat_outputs`: float32 [rows, hidden]
    original: np.ndarray  # uint8 RGB [height, width, 3]


@dataclass(frozen=True)
class GoldenProbe:
    """Example with its tap points: one forward call over prompt and answer."""

    kind: str  # "text" or "image"
    id: str
    images: list[str]
    ids: np.ndarray  # int64 [tokens]
    inputs_embeds: np.ndarray  # float32 [tokens, hidden], with image embeddings
    position_ids: np.ndarray  # int64 [position_rows, tokens]
    tap_points: dict[str, np.ndarray]  # float32 [stored rows, values] by name
    deepstack_embeds: np.ndarray | None = None  # float32 [layers, tokens, hidden]

    def split_after_images(self, image_token_id: int | None) -> tuple[list[int], list[int]]:
        """Return the tokens up to the end of the last image, and the tokens after it."""
        tokens = np.flatnonzero(self.ids == image_token_id)
        end = int(tokens[-1]) + 1 if len(tokens) else 0
        return self.ids[:end].tolist(), self.ids[end:].tolist()


def evenly_spaced(count: int, most: int = MAX_ROWS) -> np.ndarray:
    """Return at most `most` evenly spaced indices of `count` rows, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def as_matrix(value: np.ndarray) -> np.ndarray:
    """Reshape the value of a tap point, [1, rows, ...] or [rows, ...], to [rows, values]."""
    value = value[0] if value.ndim > 2 and value.shape[0] == 1 else value
    return value.reshape(len(value), -1)


def collapse_repeats(ids: np.ndarray, token: int | None) -> np.ndarray:
    """Reduce each run of `token` to one: the number of tokens of an image does not depend on the tokenizer."""
    repeated = np.diff(ids, prepend=-1) == 0
    return ids[(ids != token) | ~repeated]


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

    def examples(self) -> Iterator[GoldenExample]:
        """Yield all examples, in the order of the evaluation set."""
        for record in self.records:
            names = ("input_ids", "position_ids", "answer_ids", "logits")
            arrays = {name: self._file.get_tensor(f"examples/{record['id']}/{name}") for name in names}
            yield GoldenExample(**record, **arrays)

    def image_names(self) -> list[str]:
        """Return the file names of all images, sorted."""
        return sorted({name for record in self.records for name in record["images"]})

    def image(self, name: str) -> GoldenImage:
        """Load an image by its file name."""
        arrays = ("pixel_values", "grid_thw", "resized", "embeds", "original")
        return GoldenImage(*(self._file.get_tensor(f"images/{name}/{array}") for array in arrays))

    def probes(self) -> Iterator[GoldenProbe]:
        """Yield the "image" and the "text" probe; a set without such an example has no such probe."""
        images = {record["id"]: record["images"] for record in self.records}
        with safe_open(self.folder / ACTIVATIONS, "np") as file:
            for kind, example in sorted(json.loads(file.metadata()[PROBES]).items()):
                names = [name for name in sorted(file.keys()) if name.startswith(f"{kind}/")]
                tensors = {name.partition("/")[2]: file.get_tensor(name) for name in names}
                inputs = {name: tensors.pop(name) for name in PROBE_INPUTS if name in tensors}
                yield GoldenProbe(kind, example, images[example], **inputs, tap_points=tensors)
