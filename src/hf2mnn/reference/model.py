"""Load a checkpoint with transformers, and turn what it only warns of into errors."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.initialization import no_init_weights

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.shortage import number
from hf2mnn.machine.memory import available_memory
from hf2mnn.reference.mapped import map_matrices, without_matrices

BESIDE = 1_500_000_000
"""Bytes that a stage takes beside the weights and what it keeps: libraries, and what is being computed."""


REFUSALS = (
    *(StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError),
    *(RuntimeError, ImportError),
)
"""What transformers raises for what it cannot read: configurations are not checked before they are used."""


@contextmanager
def refused_as_source(checkpoint: Checkpoint) -> Iterator[None]:
    """What transformers raises for a configuration or weights that make no model, as a CheckpointError."""
    try:
        yield
    except (*REFUSALS, OSError) as error:
        if number(error) == errno.ENOMEM:  # the machine's failure, and said as such
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers makes no model of {checkpoint.folder}: {reason}; config.json or the weights are not right"
        ) from error


def load_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """The configuration of the model in floating point, whether or not the checkpoint holds packed layers.

    Raises:
        CheckpointError: config.json does not describe a model.
    """
    with refused_as_source(checkpoint):
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def _architecture(checkpoint: Checkpoint) -> type[transformers.PreTrainedModel]:
    return getattr(transformers, checkpoint.family.architecture)


def outline(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model as its config.json describes it, without numbers: its parameters are on the device "meta".

    Raises:
        CheckpointError: config.json does not describe a model.
    """
    config = load_config(checkpoint)
    with refused_as_source(checkpoint), torch.device("meta"):
        return _architecture(checkpoint)(config)


def _without_weights(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model as its config.json describes it, in float32, with weights of chance."""
    config = load_config(checkpoint)
    with refused_as_source(checkpoint), no_init_weights():
        model = _architecture(checkpoint)._from_config(config, dtype=torch.float32)
        if (checkpoint.folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    model.tie_weights()
    return model


def _fill(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Give the parameters of `model` the checkpoint's values. Raises CheckpointError where one is missing or has another
    shape.
    """
    for parameter, value in model.state_dict().items():
        checkpoint.check_shape(parameter, value.shape)
        value.copy_(checkpoint.tensor(parameter))


def _load_packed(checkpoint: Checkpoint) -> torch.nn.Module:
    """Transformers reads packed layers with kernels of other packages, most of them for GPUs, in float16. Here it makes
    the architecture only; the weights are the checkpoint's, packed ones as their exact float32 values.
    """
    model = _without_weights(checkpoint)
    _fill(model, checkpoint)
    checkpoint.packed_layers.check_biases({checkpoint.find(parameter) for parameter in model.state_dict()})
    return model


def _load_mapped(checkpoint: Checkpoint) -> torch.nn.Module:
    with without_matrices():
        model = _without_weights(checkpoint)
    map_matrices(model, checkpoint)
    _fill(model, checkpoint)
    return model


def place_weights(checkpoint: Checkpoint, wanted: str, kept: int = 0) -> tuple[str, str]:
    """Where `load_model` should keep the weights, "resident" or "mapped", and why. `wanted` is one of them, or "auto":
    resident where the weights in float32 fit into memory beside `kept`, the bytes that the stage holds at its end.

    Raises:
        CheckpointError: packed layers are wanted mapped.
    """
    if checkpoint.quantization:
        if wanted == "mapped":
            raise CheckpointError(
                f"the layers of {checkpoint.folder} are packed and cannot be mapped; leave --weights out"
            )
        return "resident", "packed layers are unpacked once"
    if wanted != "auto":
        return wanted, "as asked for"
    needed = 4 * sum(map(math.prod, checkpoint.shapes())) + BESIDE + kept
    free = available_memory()
    why = f"with float32 the stage needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return ("resident" if needed <= free else "mapped"), why


def load_model(checkpoint: Checkpoint, weights: str = "resident") -> torch.nn.Module:
    """The model in float32, to be asked.

    `weights` says where they are kept: "resident", in memory in float32, or "mapped", the matrices in their files
    (`hf2mnn.reference.mapped`), which takes a fraction of the memory, is slower, and computes the same bits. Packed layers
    are resident.

    Raises:
        CheckpointError: a weight is missing (transformers would draw it at random), has another shape, or is packed as
            cannot be read.
    """
    if checkpoint.quantization:
        return _load_packed(checkpoint).eval()
    if weights == "mapped":
        return _load_mapped(checkpoint).eval()
    with refused_as_source(checkpoint):
        model, report = _architecture(checkpoint).from_pretrained(
            checkpoint.folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.folder} holds no weight for {name}: its safetensors do not fit its config.json"
        )
    return model.eval()
