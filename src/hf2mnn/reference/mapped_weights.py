"""Linear layers and embeddings whose weights stay memory-mapped; a matrix is cast to float32 while its layer runs.

The cast from bfloat16 or float16 to float32 is exact, and a mapped layer makes the same call on the same numbers as one
with a float32 weight, so the results are bit-identical. One float32 matrix is in memory at a time; the operating system
may drop mapped pages and read them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import safe_open

from hf2mnn.checkpoint.folder import Checkpoint


class _Buffer:
    """Memory for one matrix, shared by all layers of a model.

    Allocating it for each call takes six times as long, most of it in page faults.
    """

    def __init__(self, numbers: int) -> None:
        self._values = torch.empty(numbers)

    def cast(self, stored: torch.Tensor) -> torch.Tensor:
        """Return `stored` in float32, valid until the next call."""
        if stored.dtype == torch.float32:
            return stored
        return self._values[: stored.numel()].view(stored.shape).copy_(stored)


class _Mapped:
    """Layer with a mapped weight.

    Attributes:
        stored: Weight in the dtype of the checkpoint, [outputs, inputs].
        buffer: Memory for its float32 values.
    """

    stored: torch.Tensor
    buffer: _Buffer

    @property
    def weight(self) -> torch.Tensor:
        """Copy of the weight in float32."""
        return self.stored.float()


class MappedLinear(_Mapped, torch.nn.Linear):
    """Linear layer with a mapped weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return torch.nn.functional.linear(input, self.buffer.cast(self.stored), self.bias)


class MappedEmbedding(_Mapped, torch.nn.Embedding):
    """Embedding with a mapped weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return torch.nn.functional.embedding(input, self.stored).float()


# Not of derived classes, whose forward may differ.
MAPPED_CLASSES: dict[type, type] = {torch.nn.Linear: MappedLinear, torch.nn.Embedding: MappedEmbedding}


@contextmanager
def skip_matrix_allocation() -> Iterator[None]:
    """Allocate no memory for the matrices of models that are built inside the block; `map_matrices` sets them."""
    register = torch.nn.Module.register_parameter

    def register_empty(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        if type(module) in MAPPED_CLASSES and name == "weight":
            value = torch.nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    torch.nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def map_matrices(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Map the weights of linear layers and embeddings of a model that was built under `skip_matrix_allocation`.

    A tied lm_head shares the mapping of the embedding.

    Raises:
        CheckpointError: A weight is missing or has another shape.
    """
    modules = {name: module for name, module in model.named_modules() if type(module) in MAPPED_CLASSES}
    sizes = [module.weight.numel() for module in modules.values() if isinstance(module, torch.nn.Linear)]
    buffer = _Buffer(max(sizes, default=0))
    # One mapping for each file: safe_open maps the whole file.
    files = {path: safe_open(path, "pt") for path in set(checkpoint.shards.values())}
    for name, module in modules.items():
        checkpoint.check_shape(f"{name}.weight", module.weight.shape)
        stored = checkpoint.find(f"{name}.weight")
        del module._parameters["weight"]
        module.__class__ = MAPPED_CLASSES[type(module)]
        module.stored, module.buffer = files[checkpoint.shards[stored]].get_tensor(stored), buffer


@contextmanager
def override_weight(module: torch.nn.Module, weight: torch.Tensor) -> Iterator[None]:
    """Run `module` with another float32 weight inside the block; modules tied to it keep theirs."""
    name = "stored" if isinstance(module, _Mapped) else "weight"
    original = getattr(module, name)
    override = weight.reshape(original.shape)
    setattr(module, name, override if name == "stored" else torch.nn.Parameter(override, requires_grad=False))
    try:
        yield
    finally:
        setattr(module, name, original)
