"""One graph of a bundle in MNN's module API, with any inputs and any outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import MNN.expr
import MNN.nn
import numpy as np

from hf2mnn.core.errors import BundleFault
from hf2mnn.mnn.bundle_config import decoder_settings, vision_settings
from hf2mnn.mnn.engine_facts import BACKEND_CONFIG

DTYPES = {"float32": MNN.expr.float, "int32": MNN.expr.int}


class Module:
    """A graph without a KV cache: attention covers the inputs of one call."""

    def __init__(
        self, graph: Path, inputs: list[str], outputs: list[str], settings: dict[str, Any], threads: int = 0
    ) -> None:
        """Load a graph (.mnn), or raise BundleFault; `threads`, if not 0, replaces the number of `settings`."""
        config = {
            "backend": 0,
            "numThread": threads or settings.get("thread_num", 4),
            "precision": BACKEND_CONFIG[settings.get("precision", "normal")],
            "memory": BACKEND_CONFIG[settings.get("memory", "normal")],
        }
        # Both must live as long as the module.
        self._runtime = MNN.nn.create_runtime_manager((config,))
        try:
            self._module = MNN.nn.load_module_from_file(str(graph), inputs, outputs, runtime_manager=self._runtime)
        except SystemError:
            # The binding's only error for an unreadable graph or a missing input.
            raise BundleFault(f"MNN does not load {graph.name} with the inputs {', '.join(inputs)}", "load") from None

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs as float32 for inputs (float32 or int32) in the order of their names."""
        arrays = [np.ascontiguousarray(array) for array in inputs]
        values = [MNN.expr.const(a, list(a.shape), MNN.expr.NCHW, DTYPES[a.dtype.name]) for a in arrays]
        return [np.array(output.read(), np.float32) for output in self._module.onForward(values)]


def runtime_settings(bundle: Path, part: str) -> dict[str, Any]:
    """Return the run-time settings of the "decoder" or the "vision" tower from the bundle's config.json."""
    config = json.loads((bundle / "config.json").read_text())
    return vision_settings(config) if part == "vision" else decoder_settings(config)
