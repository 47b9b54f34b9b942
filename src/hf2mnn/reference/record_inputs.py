"""Record the inputs of a model's linear layers on a calibration set, for AWQ, GPTQ and the sensitivity of layers.

Hooks record the float32 model in bfloat16, a bounded number of rows; `hf2mnn.quant.layer_inputs` reads the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import EvaluationSetError
from hf2mnn.core.progress import steps
from hf2mnn.reference.golden import ACTIVATIONS, Golden
from hf2mnn.reference.pytorch import ReferenceModel, prompt_and_answer

STRIDE = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio


class Sample:
    """Evenly spaced sample of at most `limit` rows from a stream [n, width] of unknown length.

    Row i has the key i / golden ratio modulo 1, and the rows with the smallest keys are kept. The gaps between rows
    whose keys lie in one interval have at most three lengths (three-distance theorem), so the sample is about as even
    as one drawn after the end of the stream. No more than `limit` rows are in memory.
    """

    def __init__(self, limit: int, width: int) -> None:
        # The operating system allocates pages as rows are written.
        self.rows = torch.empty(limit, width, dtype=torch.bfloat16)
        self.positions = np.empty(0, np.uint64)  # of the stored rows in the stream
        self.total = 0  # rows of the stream so far

    def add(self, rows: torch.Tensor) -> None:
        """Append rows [n, width] of the stream."""
        stored, limit = len(self.positions), len(self.rows)
        positions = np.concatenate([self.positions, np.arange(self.total, self.total + len(rows), dtype=np.uint64)])
        self.total += len(rows)
        chosen = np.argsort(positions * STRIDE)[:limit]  # modulo 2^64, where no two keys are equal
        added, kept = chosen[chosen >= stored], chosen[chosen < stored]
        free = np.delete(np.arange(min(limit, len(positions))), kept)
        self.rows[free] = rows[added - stored].to(torch.bfloat16)
        self.positions = np.concatenate([self.positions, np.empty(len(chosen) - stored, np.uint64)])
        self.positions[free] = positions[added]

    def in_order(self) -> torch.Tensor:
        """Return the rows in the order of the stream, bfloat16 [rows, width]."""
        return self.rows[np.argsort(self.positions)]


@dataclass
class LinearInputs:
    """Sampled inputs of linear layers; layers with the same input tensor share a sample."""

    samples: dict[str, Sample] = field(default_factory=dict)  # by the first layer that takes the tensor as its input
    readers: dict[str, str] = field(default_factory=dict)  # that layer for each one (queries, keys, values; gate, up)


@contextmanager
def record_linear_inputs(model: torch.nn.Module, limit: int) -> Iterator[LinearInputs]:
    """Record at most `limit` input rows of each torch.nn.Linear in forward calls inside the block."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inputs, first, last = LinearInputs(), "", None

    def record(module: torch.nn.Linear, args: tuple[torch.Tensor]) -> None:
        nonlocal first, last
        name, value = names[module], args[0]
        if value is not last:
            first, last = name, value
        if inputs.readers.setdefault(name, first) != first:
            raise RuntimeError(f"{name} has the input of {first} and had that of {inputs.readers[name]} before")
        if first == name:
            sample = inputs.samples.setdefault(name, Sample(limit, module.in_features))
            sample.add(value.detach().flatten(0, -2))

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(record))
        yield inputs


def _ids_by_content(golden: Golden) -> dict[tuple, str]:
    """Return the ids of examples by their prompt and the digests of their images."""
    images = ((name, golden.image(name).original) for name in golden.image_names())
    digests = {name: hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest() for name, image in images}
    return {(r["prompt"], *(digests[name] for name in r["images"])): r["id"] for r in golden.records}


def check_no_overlap(calibration: Golden, evaluation: Golden, path: str) -> None:
    """Raise EvaluationSetError if an example of the calibration set in `path` is in the evaluation set too."""
    evaluated = _ids_by_content(evaluation)
    for content, name in _ids_by_content(calibration).items():
        if content in evaluated:
            raise EvaluationSetError(
                f"example {name} of the calibration set {path} has the prompt and images of example"
                f" {evaluated[content]} of the evaluation set, which would then measure calibration data; remove it"
                " from one of them"
            )


def record_layer_inputs(
    checkpoint: Checkpoint, golden: Golden, folder: Path, rows: int, weights: str
) -> dict[str, Any]:
    """Write at most `rows` inputs of each linear layer on the prompts and answers of a calibration set.

    activations.safetensors holds bfloat16 [rows, in_features] by the first layer that takes the tensor as its input, in
    the order of the set. Its metadata `readers` is a JSON object from each layer to the name of its tensor. Returns the
    results for the manifest; `max_rows_per_tensor` is the number before sampling.
    """
    # An upper bound: layers that share an input count each, and sorting holds a sample twice.
    samples = 2 * 2 * rows * sum(shape[1] for shape in checkpoint.shapes() if len(shape) == 2)
    reference = ReferenceModel(checkpoint, 1, weights, reserved=samples)
    with record_linear_inputs(reference.model, rows) as inputs:
        for example in steps("PyTorch layer inputs", golden.examples(), "examples", len(golden.records)):
            reference.forward(*prompt_and_answer(golden, example))
    # One metadata entry: safetensors writes several in random order.
    metadata = {"readers": json.dumps(inputs.readers, sort_keys=True)}
    tensors = {name: sample.in_order() for name, sample in sorted(inputs.samples.items())}
    save_file(tensors, folder / ACTIVATIONS, metadata=metadata)
    return {
        "modules": len(inputs.readers),
        "tensors": len(tensors),
        "max_rows_per_tensor": max(sample.total for sample in inputs.samples.values()),
        "weights": reference.weights,
    }
