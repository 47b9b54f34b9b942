"""Which stored tensor each parameter of the model gets: asked from transformers, which loads placeholders.

Placeholders are tensors of the stored names and shapes without values (device "meta"). The code of `from_pretrained`
renames them, adds or removes prefixes, ties them, and reports missing and unexpected names. A parameter shares the
storage of its placeholder, which thus tells its stored tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import LoadStateDictInfo, WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from hf2mnn.checkpoint.architecture import load_config, meta_model, transformers_errors
from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.prequantized import QWEIGHT, TENSORS, WEIGHT
from hf2mnn.checkpoint.tensors import EXPONENTS, FLOATS
from hf2mnn.core.errors import CheckpointError

MISMATCH = "config and weights are not of the same model"
ROWS = 1 << 12  # rows of two tied matrices that are compared at a time


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report and progress bar: every fault in the report becomes an error here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_tensors(model: PreTrainedModel, tensors: dict[str, Any], device: str) -> LoadStateDictInfo:
    """Load stored tensors, by name, into a model of device "meta" as `from_pretrained` does; return its report.

    Parameters become float32 on `device`; those without a tensor stay on "meta", and ties are not made.
    """
    settings = LoadStateDictConfig(
        ignore_mismatched_sizes=True,  # reported as well, and refused here with our own message
        device_map={"": device},
        dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),
    )
    with _quiet():
        report, _ = model._load_pretrained_model(model, tensors, None, settings)
        if device == "meta":
            report = model._finalize_model_loading(model, settings, report)
    return report


def _placeholders(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return a placeholder for each stored tensor, and for each prequantized layer one for its weight."""
    layers = checkpoint.prequantized_layers
    parts = {f"{layer}.{tensor}" for layer in layers.names for tensor in TENSORS}
    shapes = {name: tensor.shape for name, tensor in checkpoint.headers.items() if name not in parts}
    shapes |= {f"{layer}{WEIGHT}": layers.shape(layer) for layer in layers.names}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _stored_name(checkpoint: Checkpoint, name: str) -> str:
    return name if name in checkpoint.headers else name.removesuffix(WEIGHT) + QWEIGHT


def _same_values(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Return whether two stored matrices have the same float32 values, as `tie_weights` of transformers asks."""
    stored = [checkpoint.headers[name].stored() for name in (one, other)]
    if None in stored:
        return torch.equal(*(checkpoint.read(name).float() for name in (one, other)))
    count = stored[0].shape[0]
    blocks = ([tensor.rows(row, min(row + ROWS, count)) for tensor in stored] for row in range(0, count, ROWS))
    return all(np.array_equal(*block) for block in blocks)


def parameter_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return the parameter to which transformers maps each stored name, of a parameter of any release or not."""
    transforms, known = get_model_conversion_mapping(model), model.state_dict()
    renamings, converters = (
        [t for t in transforms if isinstance(t, kind)] for kind in (WeightRenaming, WeightConverter)
    )

    def rename(name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]) -> str:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0]

    renamed = {name: rename(name, renamings, converters) for name in names}
    # The second attempt of `convert_and_load_state_dict_in_model`.
    return {name: rename(name, [], []) if key not in known and name in known else key for name, key in renamed.items()}


def _check_leftovers(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raise CheckpointError for a stored tensor that transformers drops though the result may depend on it.

    A bias of zeros, which AutoGPTQ stores for every layer, has no effect.
    """
    for name in names:
        if name.endswith(".bias"):
            if not checkpoint.read(name).any():
                continue
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is not zero, but the model of config.json has no bias there; {MISMATCH}"
            )
        raise CheckpointError(
            f"{checkpoint.folder} holds {name}, which the model of its config.json does not have; {MISMATCH}, or a"
            " quantization_config that belongs to them was removed"
        )


def map_parameters(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the name of the stored tensor of each parameter of the transformers model; of a quantized one its qweight.

    Parameters that share a stored tensor are tied. If transformers ties two that are both stored with the same values,
    both have the tensor of the first; with different values it ties them not, and each has its own. Raise
    CheckpointError for what transformers would load wrongly: a weight that is missing, of another shape, of a dtype
    that needs scales, or made of several tensors, and a stored tensor that it drops.
    """
    placeholders = _placeholders(checkpoint)
    model = meta_model(checkpoint)
    with transformers_errors(checkpoint):
        report = load_tensors(model, placeholders, "meta")
    stored = {tensor.untyped_storage()._cdata: name for name, tensor in placeholders.items()}
    origins = {name: stored.get(value.untyped_storage()._cdata) for name, value in model.state_dict().items()}
    names = {parameter: _stored_name(checkpoint, name) for parameter, name in origins.items() if name is not None}
    renamed = {key: _stored_name(checkpoint, name) for name, key in parameter_names(model, placeholders).items()}
    if report.mismatched_keys:
        parameter, shape, expected = min(report.mismatched_keys)
        raise CheckpointError(
            f"{checkpoint.folder} has {renamed.get(parameter, parameter)} of shape {list(shape)}, but its config.json"
            f" requires {list(expected)}; {MISMATCH}"
        )
    if report.missing_keys:
        raise CheckpointError(
            f"{checkpoint.folder} has no weight for {min(report.missing_keys)}; its safetensors and config.json are not"
            " of the same model"
        )
    if converted := sorted(origins.keys() - names.keys()):
        raise CheckpointError(
            f"{checkpoint.folder} has {converted[0]} in a form that transformers converts when it loads it, which is"
            " not supported; save the checkpoint again with its save_pretrained"
        )
    for name in sorted(set(names.values())):
        dtype = checkpoint.headers[name].dtype
        if dtype not in EXPONENTS and not name.endswith(QWEIGHT):
            raise CheckpointError(
                f"{checkpoint.folder} has {name} with dtype {dtype}: quantized values, of which config.json names no"
                f" scales; take the model in {', '.join(FLOATS)}, or an AWQ or GPTQ checkpoint"
            )
    _check_leftovers(checkpoint, sorted(renamed.get(key, key) for key in report.unexpected_keys))
    for target, source in model.all_tied_weights_keys.items():
        if names[target] != names[source] and _same_values(checkpoint, names[target], names[source]):
            names[target] = names[source]
    return names


def resolved_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the configuration of the floating-point model, with the ties that transformers makes."""
    config = load_config(checkpoint)
    config.tie_word_embeddings = checkpoint.tied
    return config
