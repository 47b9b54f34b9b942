"""What PyTorch computes inside, at the points of `hf2mnn.onnx.tap_points`: kept once, so that any conversion can be laid
beside it layer by layer.

Recorded by forward hooks and by an attention function that listens: the model itself is transformers', unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf2mnn.reference.tap_points import as_rows, kept_rows

LISTENING = "hf2mnn_listening"


def _array(value: Any) -> np.ndarray:
    value = value[0] if isinstance(value, tuple) else value
    return value.detach().float().cpu().numpy()


class _Recorder:
    def __init__(self, model: torch.nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.values: dict[str, np.ndarray] = {}
        self.pieces: dict[str, list[np.ndarray]] = {}

    def keep(self, name: str, rows: np.ndarray) -> None:
        self.values[name] = np.ascontiguousarray(rows[kept_rows(len(rows))])

    def attend(self, module: torch.nn.Module, query, key, value, attention_mask, **options: Any):
        """Transformers' own sdpa, after a note of what it is given: query and key [1, heads, rows, head size]."""
        output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
        name = self.names[module]
        # A decoder's keys include none of earlier calls here: there is no cache.
        parts = {"query": query.transpose(1, 2), "key": key.transpose(1, 2), "context": output[0]}
        for part, value in parts.items():
            self.pieces.setdefault(f"{name}.{part}", []).append(as_rows(_array(value)))
        return output

    def join(self) -> None:
        """A vision tower attends image by image, or window by window: one call after another."""
        for name, pieces in self.pieces.items():
            self.keep(name, np.concatenate(pieces))


def _is_point(name: str, module: torch.nn.Module) -> bool:
    """Modules with a weight, but for the embedding, and blocks: members of a list that have parts."""
    # A linear layer's weight is no parameter where it is mapped.
    owns = isinstance(module, torch.nn.Linear) or (
        "weight" in module._parameters and not isinstance(module, torch.nn.Embedding)
    )
    return owns or (name.rpartition(".")[2].isdigit() and any(True for _ in module.children()))


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """While the block runs, every forward of `model` leaves its points here: float32 [kept rows, values] by name."""
    recorder = _Recorder(model)
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: recorder.keep(name, as_rows(_array(output))))
        for name, module in model.named_modules()
        if _is_point(name, module)
    ]
    configs = list({id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values())
    before = [config._attn_implementation for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(LISTENING, recorder.attend)
    for config in configs:
        config._attn_implementation = LISTENING
    try:
        yield recorder.values
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        for hook in hooks:
            hook.remove()
        recorder.join()
