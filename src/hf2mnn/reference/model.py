"""Load a checkpoint with transformers in float32; problems that transformers only warns of are errors."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import transformers
from transformers.initialization import no_init_weights

from hf2mnn.checkpoint.architecture import load_config, model_class, transformers_errors
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.machine.hardware import available_memory
from hf2mnn.reference.mapped_weights import map_matrices, skip_matrix_allocation

OVERHEAD = 1_500_000_000
"""Bytes of a stage's memory for libraries and activations."""


def _uninitialized_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """Build the model of config.json in float32, with undefined weights."""
    config = load_config(checkpoint)
    with transformers_errors(checkpoint), no_init_weights():
        model = model_class(checkpoint)._from_config(config, dtype=torch.float32)
        if (checkpoint.folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    model.tie_weights()
    return model


def _load_tensors(checkpoint: Checkpoint, mapped: bool) -> torch.nn.Module:
    """Build the model and copy the checkpoint's tensors to it; matrices are dequantized or mapped.

    For AWQ and GPTQ checkpoints, transformers needs kernels of other packages, most of which run in float16 on a GPU.
    Here the model has the exact float32 values of their quantized weights.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    with skip_matrix_allocation() if mapped else nullcontext():
        model = _uninitialized_model(checkpoint)
    if mapped:
        map_matrices(model, checkpoint)
    parameters = model.state_dict()
    for parameter, value in parameters.items():
        checkpoint.check_shape(parameter, value.shape)
        value.copy_(checkpoint.tensor(parameter))
    if checkpoint.quantization:
        checkpoint.prequantized_layers.check_biases({checkpoint.find(parameter) for parameter in parameters})
    return model


def choose_weight_storage(checkpoint: Checkpoint, weights: str, reserved: int = 0) -> tuple[str, str]:
    """Choose where `load_model` keeps the weights.

    Args:
        checkpoint: Checkpoint to load.
        weights: "resident", "mapped", or "auto": resident if the float32 weights fit into the free memory.
        reserved: Bytes that the stage needs for its results.

    Returns:
        "resident" or "mapped", and the reason.

    Raises:
        CheckpointError: `weights` is "mapped" for a prequantized checkpoint.
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
    """Load the model in float32 and evaluation mode.

    Args:
        checkpoint: Checkpoint to load.
        weights: "resident" keeps float32 weights in memory. "mapped" keeps matrices memory-mapped in the checkpoint's
            dtype (`hf2mnn.reference.mapped_weights`): less memory, slower, bit-identical results. Prequantized layers
            are always resident.

    Raises:
        CheckpointError: A weight is missing, which transformers would initialize at random, has another shape, or has
            an unsupported quantization.
    """
    if checkpoint.quantization or weights == "mapped":
        return _load_tensors(checkpoint, mapped=not checkpoint.quantization).eval()
    with transformers_errors(checkpoint):
        model, report = model_class(checkpoint).from_pretrained(
            checkpoint.folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.folder} has no weight {min(report['missing_keys'])}: its safetensors files do not fit its"
            " config.json; download it again"
        )
    return model.eval()
