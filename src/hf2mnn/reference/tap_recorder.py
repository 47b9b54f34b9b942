"""Record tap points of a PyTorch model, for the layer-by-layer comparison of conversions.

Forward hooks and an attention function record; the modules of transformers stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf2mnn.reference.golden import as_matrix, evenly_spaced

RECORDING = "hf2mnn_recording"  # name of the recording attention function in transformers


def _array(value: Any) -> np.ndarray:
    value = value[0] if isinstance(value, tuple) else value
    return value.detach().float().cpu().numpy()


class _Recorder:
    def __init__(self, model: torch.nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.values: dict[str, np.ndarray] = {}
        self.pieces: dict[str, list[np.ndarray]] = {}

    def keep(self, name: str, rows: np.ndarray) -> None:
        self.values[name] = np.ascontiguousarray(rows[evenly_spaced(len(rows))])

    def attention(self, module: torch.nn.Module, query, key, value, attention_mask, **options: Any):
        """Run the sdpa attention of transformers, and record it; query and key are [1, heads, rows, head_dim]."""
        output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
        name = self.names[module]
        # The model runs without a KV cache, so keys are of these rows alone.
        parts = {"query": query.transpose(1, 2), "key": key.transpose(1, 2), "context": output[0]}
        for part, value in parts.items():
            self.pieces.setdefault(f"{name}.{part}", []).append(as_matrix(_array(value)))
        return output

    def join(self) -> None:
        """Concatenate the calls of each attention: a vision tower makes one for each image or window."""
        for name, pieces in self.pieces.items():
            self.keep(name, np.concatenate(pieces))


def _is_tap_point(name: str, module: torch.nn.Module) -> bool:
    """Return whether a module has a weight and is no embedding, or is a block: an item of a list with children."""
    if isinstance(module, torch.nn.Linear | torch.nn.Embedding):  # if mapped, without a weight among its parameters
        return isinstance(module, torch.nn.Linear)
    return "weight" in module._parameters or (
        name.rpartition(".")[2].isdigit() and next(module.children(), None) is not None
    )


@contextmanager
def record_tap_points(model: torch.nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Record the tap points of forward calls inside the block: float32 [stored rows, values] by name.

    Those of attentions are added at the end of the block.
    """
    recorder = _Recorder(model)
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    ALL_ATTENTION_FUNCTIONS.register(RECORDING, recorder.attention)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if _is_tap_point(name, module):
                hook = module.register_forward_hook(
                    lambda _, __, output, name=name: recorder.keep(name, as_matrix(_array(output)))
                )
                hooks.enter_context(hook)
        for config in configs:
            hooks.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = RECORDING
        yield recorder.values
    recorder.join()
