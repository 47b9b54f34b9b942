"""Weights that stay in their file: a matrix is made float32 only while its layer runs.

bfloat16 and float16 become float32 exactly, and a layer computes with the same call on the same numbers as one whose
weight is held in float32: the results are the same bits. In memory is one matrix at a time; what else is read of the
file the system may drop and read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import safe_open

from hf2mnn.checkpoint.folder import Checkpoint


class _Buffer:
    """Memory for one matrix, shared by all layers of a model: a fresh one each time would take six times as long, most
    of it in page faults.
    """

    def __init__(self, numbers: int) -> None:
        self._values = torch.empty(numbers)

    def cast(self, stored: torch.Tensor) -> torch.Tensor:
        """`stored` in float32, good until the next call."""
        if stored.dtype == torch.float32:
            return stored
        return self._values[: stored.numel()].view(stored.shape).copy_(stored)


class _Mapped:
    """`stored` is the weight in the checkpoint's dtype, [outputs, inputs], mapped from its file."""

    stored: torch.Tensor
    buffer: _Buffer

    @property
    def weight(self) -> torch.Tensor:
        """float32, a copy of its own."""
        return self.stored.float()


class MappedLinear(_Mapped, torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.buffer.cast(self.stored), self.bias)


class MappedEmbedding(_Mapped, torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(input, self.stored).float()


# Of these classes alone, not of classes derived from them, whose forward may be another.
KINDS: dict[type, type] = {torch.nn.Linear: MappedLinear, torch.nn.Embedding: MappedEmbedding}


@contextmanager
def without_matrices() -> Iterator[None]:
    """Models made here have no memory for the matrices that `map_matrices` will give them."""
    register = torch.nn.Module.register_parameter

    def register_empty(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        if type(module) in KINDS and name == "weight":
            value = torch.nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    torch.nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def map_matrices(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Let the linear layers and embeddings of `model`, made `without_matrices`, work with weights that stay in their
    files; lm_head and the embedding with one where they are tied.

    Raises:
        CheckpointError: a weight is missing or has another shape.
    """
    modules = {name: module for name, module in model.named_modules() if type(module) in KINDS}
    linear = [module.weight.numel() for module in modules.values() if isinstance(module, torch.nn.Linear)]
    buffer = _Buffer(max(linear, default=0))
    # One mapping a file: each safe_open makes one of all of it.
    files = {path: safe_open(path, "pt") for path in set(checkpoint.shards.values())}
    for name, module in modules.items():
        checkpoint.check_shape(f"{name}.weight", module.weight.shape)
        stored = checkpoint.find(f"{name}.weight")
        del module._parameters["weight"]
        module.__class__ = KINDS[type(module)]
        module.stored, module.buffer = files[checkpoint.shards[stored]].get_tensor(stored), buffer


@contextmanager
def replaced(module: torch.nn.Module, weight: torch.Tensor) -> Iterator[None]:
    """While the block runs, `module` alone works with this weight, float32 of as many numbers as its own, also where
    it shares that.
    """
    name = "stored" if isinstance(module, _Mapped) else "weight"
    right = getattr(module, name)
    made = weight.reshape(right.shape)
    setattr(module, name, made if name == "stored" else torch.nn.Parameter(made, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, name, right)
