"""Inputs of the linear layers of a model on a calibration set.

How often and how strongly a column of a weight is used decides what an error in it costs: a quantization that knows
rows of the layer's input can weigh its errors. The model is transformers', in float32; what each layer reads is
kept by hooks, in bfloat16, and at most so many rows of it however long the set is. `hf2mnn.quant.layer_inputs` reads
the file, without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.progress import steps
from hf2mnn.reference.golden import ACTIVATIONS, Golden
from hf2mnn.reference.pytorch import Reference, prompt_and_answer

STRIDE = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio."""


class Sample:
    """At most `limit` rows of a stream of rows [n, width], evenly spread over all of it, however many come.

    Row i has the key i / golden ratio modulo 1, and the rows with the smallest keys are kept. Between rows whose keys
    lie in one interval there are gaps of at most three lengths (the three-distance theorem), so a sample is about as
    even as one that knew the end of the stream, and no more than `limit` rows are ever held.
    """

    def __init__(self, limit: int, width: int) -> None:
        # Memory is taken page by page, as rows come.
        self.rows = torch.empty(limit, width, dtype=torch.bfloat16)
        self.places = np.empty(0, np.uint64)
        self.seen = 0

    def add(self, rows: torch.Tensor) -> None:
        held, limit = len(self.places), len(self.rows)
        places = np.concatenate([self.places, np.arange(self.seen, self.seen + len(rows), dtype=np.uint64)])
        self.seen += len(rows)
        kept = np.argsort(places * STRIDE)[:limit]  # modulo 2^64, where no two are equal
        come, stay = kept[kept >= held], kept[kept < held]
        free = np.delete(np.arange(min(limit, len(places))), stay)
        self.rows[free] = rows[come - held].to(torch.bfloat16)
        self.places = np.concatenate([self.places, np.empty(len(kept) - held, np.uint64)])
        self.places[free] = places[come]

    def in_order(self) -> torch.Tensor:
        """bfloat16 [kept rows, width], in the order in which they came."""
        return self.rows[np.argsort(self.places)]


class LinearInputs:
    """`samples` by the name of the layer that read it first; `readers` maps every layer to such a name, its own where
    no other layer has read the same tensor just before (queries, keys and values; gate and up).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.samples: dict[str, Sample] = {}
        self.readers: dict[str, str] = {}
        self._last: tuple[str, torch.Tensor | None] = ("", None)

    def hear(self, name: str, value: torch.Tensor) -> None:
        """`name` is about to read `value` [..., in_features]."""
        if value is not self._last[1]:
            self._last = (name, value)
        first = self._last[0]
        if self.readers.setdefault(name, first) != first:
            raise RuntimeError(f"{name} reads now what {first} reads and not, as before, {self.readers[name]}")
        if first == name:
            sample = self.samples.setdefault(name, Sample(self.limit, value.shape[-1]))
            sample.add(value.detach().reshape(-1, value.shape[-1]))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: sample.in_order() for name, sample in sorted(self.samples.items())}


@contextmanager
def listening(model: torch.nn.Module, limit: int) -> Iterator[LinearInputs]:
    """While the block runs, at most `limit` rows of what each torch.nn.Linear of `model` reads are kept here."""
    heard = LinearInputs(limit)
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: heard.hear(name, given[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _asked(golden: Golden) -> dict[tuple[str, ...], str]:
    """Example by its prompt and the pixels of its images."""
    seen = {}
    for name in golden.image_names():
        image = golden.image(name).original
        seen[name] = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
    return {(r["prompt"], *(seen[name] for name in r["images"])): r["id"] for r in golden.records}


def refuse_overlap(calibration: Golden, evaluation: Golden, place: str) -> None:
    """Raises EvaluationSetError for the first example of the calibration set that the evaluation set has too."""
    judged = _asked(evaluation)
    for asked, name in _asked(calibration).items():
        if asked in judged:
            raise EvaluationSetError(
                f"example {name} of the calibration set {place} has the prompt and the images of example"
                f" {judged[asked]} of the evaluation set, which would then judge what was fitted to it; take it out"
            )


def _read_all(reference: Reference, golden: Golden, rows: int) -> LinearInputs:
    with listening(reference.model, rows) as heard:
        for example in steps("PyTorch reads", golden.examples(), "examples", len(golden.records)):
            reference.read(*prompt_and_answer(golden, example))
    return heard


def record_layer_inputs(
    checkpoint: Checkpoint, calibration: Golden, folder: Path, rows: int, weights: str
) -> dict[str, Any]:
    """Write at most `rows` rows of the inputs of each linear layer, over examples and answers of `calibration`.

    activations.safetensors holds bfloat16 [rows, in_features] by the name of the layer that reads them first, rows in
    the order of the set. Its metadata `readers` is JSON: the name of each layer and that of the tensor that it reads.

    Returns:
        Numbers of `modules`, of `tensors` and of `most_rows_read`; where the `weights` were.
    """
    # Layers that read the same are counted each; a sample is held twice while it is put in order.
    samples = 2 * 2 * rows * sum(shape[1] for shape in checkpoint.shapes() if len(shape) == 2)
    reference = Reference(checkpoint, 1, weights, kept=samples)
    heard = _read_all(reference, calibration, rows)
    # One entry: safetensors writes several in random order.
    readers = {"readers": json.dumps(heard.readers, sort_keys=True)}
    save_file(heard.tensors(), folder / ACTIVATIONS, metadata=readers)
    return {
        "modules": len(heard.readers),
        "tensors": len(heard.samples),
        "most_rows_read": max(sample.seen for sample in heard.samples.values()),
        "weights": reference.weights,
    }
