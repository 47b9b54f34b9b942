"""One graph of a bundle by MNN's module API, which lets any input be given and any value be read."""

from __future__ import annotations

import json
from pathlib import Path

import MNN.expr
import MNN.nn
import numpy as np


class Refused(Exception):
    """What is wrong with a bundle, in a sentence for the user."""


LEVELS = {"normal": 0, "high": 1, "low": 2}
"""BackendConfig's enumerations of precision and memory, which the module API takes as integers."""
KINDS = {"float32": MNN.expr.float, "int32": MNN.expr.int}


class Module:
    """A graph without a KV cache: attention is over what is given in one call."""

    def __init__(self, graph: Path, inputs: list[str], outputs: list[str], settings: dict, threads: int) -> None:
        """`settings` are the bundle's (config.json, or its "mllm"); `threads` 0 keeps the bundle's own number."""
        described = {
            "backend": 0,
            "numThread": threads or settings.get("thread_num", 4),
            "precision": LEVELS[settings.get("precision", "normal")],
            "memory": LEVELS[settings.get("memory", "normal")],
        }
        # Both must live as long as the module.
        self._runtime = MNN.nn.create_runtime_manager((described,))
        try:
            self._module = MNN.nn.load_module_from_file(str(graph), inputs, outputs, runtime_manager=self._runtime)
        except SystemError:
            # The binding's only word for a graph that cannot be read, or that asks for an input that is not given.
            raise Refused(f"MNN does not load {graph.name} with the inputs {', '.join(inputs)}") from None

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Outputs as float32; inputs are float32 or int32, in the order of their names."""
        fed = [MNN.expr.const(a, list(a.shape), MNN.expr.NCHW, KINDS[a.dtype.name]) for a in inputs]
        return [np.array(output.read(), np.float32) for output in self._module.onForward(fed)]


def runtime_settings(bundle: Path, part: str) -> dict:
    """Engine settings of the "decoder" or the "vision" tower, as the bundle's config.json has them."""
    config = json.loads((bundle / "config.json").read_text())
    return config.get("mllm", {}) if part == "vision" else config
