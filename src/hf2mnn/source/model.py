"""Load a checkpoint with transformers, and turn what it only warns of into errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

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
    """Raises SourceError where config.json does not describe a model."""
    with refused_as_source(checkpoint):
        return transformers.AutoConfig.from_pretrained(checkpoint.folder)


def load_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model in float32, to be asked.

    Raises:
        SourceError: a weight is missing (transformers would draw it at random) or has another shape.
    """
    architecture = getattr(transformers, checkpoint.family.architecture)
    with refused_as_source(checkpoint):
        model, report = architecture.from_pretrained(checkpoint.folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        name = min(report["missing_keys"])
        raise SourceError(f"{checkpoint.folder} holds no weight for {name}: its safetensors do not fit its config.json")
    return model.eval()
