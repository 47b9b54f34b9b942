"""Inner tensors of a bundle's graphs for given inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from hf2mnn.mnn.worker.module import Module, runtime_settings


def run(job: dict[str, Any]) -> None:
    """Run each of job["graphs"] and write its outputs, unchanged, by name.

    A graph has: graph (path), part, inputs (names in order), outputs (names), fed and result (safetensors).
    """
    for graph in job["graphs"]:
        inputs, settings = load_file(graph["fed"]), runtime_settings(Path(job["bundle"]), graph["part"])
        module = Module(Path(graph["graph"]), graph["inputs"], graph["outputs"], settings, job["threads"])
        values = module([inputs[name] for name in graph["inputs"]])
        named = zip(graph["outputs"], values, strict=True)
        save_file({name: np.ascontiguousarray(value) for name, value in named}, graph["result"])
