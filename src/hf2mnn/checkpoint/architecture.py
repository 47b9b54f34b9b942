"""Build the transformers model of a checkpoint without its weights."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.machine_errors import machine_errno

CONFIG_ERRORS = (StrictDataclassError, ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
CONFIG_ERRORS += (TypeError, ValueError)
"""Exceptions of transformers for an invalid config.json: it uses values before it validates them."""


@contextmanager
def transformers_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn exceptions of transformers for an invalid configuration or weights into CheckpointError."""
    try:
        yield
    except CONFIG_ERRORS as error:
        if machine_errno(error) == errno.ENOMEM:  # no fault of the checkpoint
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers cannot build the model of {checkpoint.folder}: {reason}; correct config.json or the weights"
        ) from error


def load_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """Return the configuration of the floating-point model, also of a prequantized checkpoint."""
    with transformers_errors(checkpoint):
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return config


def load_settings(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the model and of its decoder as transformers has them, with its defaults."""
    config = load_config(checkpoint)
    return config.to_dict(), config.get_text_config().to_dict()


def model_class(checkpoint: Checkpoint) -> type[transformers.PreTrainedModel]:
    """Return the transformers class of the checkpoint's family."""
    return getattr(transformers, checkpoint.family.architecture)


def meta_model(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """Build the model of config.json in float32 with parameters on the device "meta": shapes without values."""
    config = load_config(checkpoint)
    with transformers_errors(checkpoint), torch.device("meta"):
        return model_class(checkpoint)._from_config(config, dtype=torch.float32)
