"""Load a checkpoint with transformers in float32; problems that transformers only warns of are errors.

The matrices of linear layers and embeddings may stay memory-mapped in the checkpoint's dtype, and are cast to float32,
one at a time, while their layer runs. The cast is exact, and the layer makes the same call on the same numbers as one
with a float32 weight, so the results are bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import transformers
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.initialization import no_init_weights

from hf2mnn.checkpoint.architecture import model_class, transformers_errors
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.loading import resolved_config
from hf2mnn.core.errors import CheckpointError
from hf2mnn.machine.hardware import available_memory

OVERHEAD = 1_500_000_000  # bytes of a stage's memory for libraries and activations


class _Mapped:
    """Layer with a mapped weight."""

    stored: torch.Tensor  # weight [outputs, inputs] in the dtype of the checkpoint
    # Memory for the float32 values of the largest matrix, shared by all layers of a model. Allocating it for each call
    # takes six times as long, most of it in page faults.
    buffer: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """Copy of the weight in float32."""
        return self.stored.float()


class MappedLinear(_Mapped, torch.nn.Linear):
    """Linear layer with a mapped weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        weight = self.stored
        if weight.dtype != torch.float32:
            weight = self.buffer[: weight.numel()].view(weight.shape).copy_(weight)
        return torch.nn.functional.linear(input, weight, self.bias)


class MappedEmbedding(_Mapped, torch.nn.Embedding):
    """Embedding with a mapped weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return torch.nn.functional.embedding(input, self.stored).float()


# Not of derived classes, whose forward may differ.
MAPPED_CLASSES: dict[type, type] = {torch.nn.Linear: MappedLinear, torch.nn.Embedding: MappedEmbedding}


def _skip_matrix_allocation() -> AbstractContextManager:
    """Allocate no memory for the matrices of models that are built inside the block; `_map_matrices` sets them."""

    def to_meta(module: torch.nn.Module, name: str, value: torch.nn.Parameter) -> torch.nn.Parameter | None:
        is_matrix = type(module) in MAPPED_CLASSES and name == "weight"
        return torch.nn.Parameter(value.to("meta"), requires_grad=False) if is_matrix else None

    return register_module_parameter_registration_hook(to_meta)


def _map_matrices(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Map the weights of linear layers and embeddings of a model that was built under `_skip_matrix_allocation`.

    A tied lm_head shares the mapping of the embedding.
    """
    modules = {name: module for name, module in model.named_modules() if type(module) in MAPPED_CLASSES}
    sizes = [module.weight.numel() for module in modules.values() if isinstance(module, torch.nn.Linear)]
    buffer = torch.empty(max(sizes, default=0))
    # One mapping for each file: safe_open maps the whole file.
    files = {path: safe_open(path, "pt") for path in {tensor.path for tensor in checkpoint.headers.values()}}
    for name, module in modules.items():
        stored = checkpoint.find(f"{name}.weight")
        del module._parameters["weight"]
        module.__class__ = MAPPED_CLASSES[type(module)]
        module.stored, module.buffer = files[checkpoint.headers[stored].path].get_tensor(stored), buffer


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


def _load_tensors(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the model and copy the checkpoint's tensors to it; matrices are dequantized or mapped.

    For AWQ and GPTQ checkpoints, transformers needs kernels of other packages, most of which run in float16 on a GPU.
    Here the model has the exact float32 values of their quantized weights.
    """
    config, mapped = resolved_config(checkpoint), not checkpoint.quantization
    with _skip_matrix_allocation() if mapped else nullcontext(), transformers_errors(checkpoint), no_init_weights():
        model = model_class(checkpoint)._from_config(config, dtype=torch.float32)
        if (checkpoint.folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    model.tie_weights()
    if mapped:
        _map_matrices(model, checkpoint)
    for parameter, value in model.state_dict().items():
        value.copy_(checkpoint.tensor(parameter))
    return model


def choose_weight_storage(checkpoint: Checkpoint, weights: str, reserved: int = 0) -> tuple[str, str]:
    """Return where `load_model` keeps the weights, "resident" or "mapped", and the reason.

    "resident" keeps float32 weights in memory; "mapped" leaves matrices in their files: less memory, slower,
    bit-identical. `weights` "auto" is resident if the float32 weights and `reserved` bytes for results fit into the
    free memory. The layers of a prequantized checkpoint cannot be mapped, which is a CheckpointError.
    """
    if checkpoint.quantization:
        if weights == "mapped":
            raise CheckpointError(f"the prequantized layers of {checkpoint.folder} cannot be mapped; omit --weights")
        return "resident", "prequantized layers are dequantized once"
    if weights != "auto":
        return weights, "set by --weights"
    needed = 4 * sum(map(math.prod, checkpoint.shapes())) + OVERHEAD + reserved
    free = available_memory()
    reason = f"float32 weights need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return ("resident" if needed <= free else "mapped"), reason


def load_model(checkpoint: Checkpoint, weights: str = "resident") -> torch.nn.Module:
    """Load the model in float32 and evaluation mode; `choose_weight_storage` explains `weights`.

    Raise CheckpointError for weights that transformers would load wrongly; see `map_parameters`.
    """
    _ = checkpoint.names
    if checkpoint.quantization or weights == "mapped":
        return _load_tensors(checkpoint).eval()
    with transformers_errors(checkpoint):
        model = model_class(checkpoint).from_pretrained(checkpoint.folder, dtype=torch.float32, use_safetensors=True)
    return model.eval()
