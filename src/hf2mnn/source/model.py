"""Load a checkpoint with transformers, and turn what it only warns of into errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.initialization import no_init_weights

from hf2mnn.errors import SourceError
from hf2mnn.source.checkpoint import Checkpoint


@contextmanager
def refused_as_source(checkpoint: Checkpoint) -> Iterator[None]:
    """What transformers raises for a configuration or weights that make no model, as a SourceError."""
    try:
        yield
    except (StrictDataclassError, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(
            f"transformers makes no model of {checkpoint.folder}: {reason}; config.json or the weights are not right"
        ) from error


def load_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """The configuration of the model in floating point, whether or not the checkpoint holds packed layers.

    Raises:
        SourceError: config.json does not describe a model.
    """
    with refused_as_source(checkpoint):
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def _load_packed(checkpoint: Checkpoint, architecture: type[transformers.PreTrainedModel]) -> torch.nn.Module:
    """transformers reads packed layers with kernels of other packages, most of them for GPUs, in float16. Here it makes
    the architecture only; the weights are the checkpoint's, packed ones as their exact float32 values."""
    config = load_config(checkpoint)
    with refused_as_source(checkpoint), no_init_weights():
        model = architecture._from_config(config, dtype=torch.float32)
        if (checkpoint.folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    model.tie_weights()
    parameters = model.state_dict()
    for parameter, value in parameters.items():
        weight = checkpoint.tensor(parameter)
        if weight.shape != value.shape:
            raise SourceError(
                f"{checkpoint.folder} holds {checkpoint.find(parameter)} as {list(weight.shape)}, its config.json asks"
                f" for {list(value.shape)}: config and weights are not of one model"
            )
        value.copy_(weight)
    checkpoint.packed_layers.check_biases({checkpoint.find(parameter) for parameter in parameters})
    return model


def load_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model in float32, to be asked.

    Raises:
        SourceError: a weight is missing (transformers would draw it at random), has another shape, or is packed as
            cannot be read.
    """
    architecture = getattr(transformers, checkpoint.family.architecture)
    if checkpoint.quantization:
        return _load_packed(checkpoint, architecture).eval()
    with refused_as_source(checkpoint):
        model, report = architecture.from_pretrained(checkpoint.folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise SourceError(f"{checkpoint.folder} holds no weight for {name}: its safetensors do not fit its config.json")
    return model.eval()
