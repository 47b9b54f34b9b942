"""Record tap points of a PyTorch model by forward hooks and an attention function, to compare conversions by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf2mnn.reference.golden import as_matrix, evenly_spaced

RECORDING = "hf2mnn_recording"  # name of the recording attention function in transformers


def _matrix(tensor: torch.Tensor) -> np.ndarray:
    return as_matrix(tensor.detach().float().cpu().numpy())


def _is_tap_point(name: str, module: torch.nn.Module) -> bool:
    """Return whether a module has a weight and is no embedding, or is a block: an item of a list with children."""
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):  # if mapped, without a weight among its parameters
        return isinstance(module, torch.nn.Linear)
    is_block = name.rpartition(".")[2].isdigit() and next(module.children(), None) is not None
    return is_block or "weight" in module._parameters


@contextmanager
def record_tap_points(model: torch.nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Record the tap points of forward calls inside the block: float32 [stored rows, values] by name.

    Those of attentions are added at the end of the block.
    """
    names = {module: name for name, module in model.named_modules()}
    configs = {id(part.config): part.config for part in names if hasattr(part, "config")}.values()
    values: dict[str, np.ndarray] = {}
    attentions: dict[str, list[np.ndarray]] = defaultdict(list)  # a vision tower makes a call for each image or window

    def keep(name: str, rows: np.ndarray) -> None:
        values[name] = np.ascontiguousarray(rows[evenly_spaced(len(rows))])

    def record_output(module: torch.nn.Module, _: Any, output: Any) -> None:
        keep(names[module], _matrix(output[0] if isinstance(output, tuple) else output))

    def record_attention(module: torch.nn.Module, query, key, value, attention_mask, **options: Any):
        """Run the sdpa attention of transformers; query and key are [1, heads, rows, head_dim]."""
        output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
        # The model runs without a KV cache, so keys are of these rows alone.
        parts = {"query": query.transpose(1, 2), "key": key.transpose(1, 2), "context": output[0]}
        for part, tensor in parts.items():
            attentions[f"{names[module]}.{part}"].append(_matrix(tensor))
        return output

    ALL_ATTENTION_FUNCTIONS.register(RECORDING, record_attention)
    with ExitStack() as hooks:
        for module, name in names.items():
            if _is_tap_point(name, module):
                hooks.enter_context(module.register_forward_hook(record_output))
        for config in configs:
            hooks.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = RECORDING
        yield values
    for name, pieces in attentions.items():
        keep(name, np.concatenate(pieces))
