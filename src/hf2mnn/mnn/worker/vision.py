"""The bundle's vision tower alone: transformers' own pixels can be given to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.core.progress import steps
from hf2mnn.families import VisionFamily
from hf2mnn.mnn.worker.module import Module, runtime_settings
from hf2mnn.reference.golden import Golden


def vision_embeds(
    bundle: Path, golden: Golden, family: VisionFamily, model: dict[str, Any], threads: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Each image's embeddings float32 [rows, hidden] (`VisionFamily.as_rows`). `model` is model.json."""
    module = None
    for name in steps("MNN sees", golden.image_names(), "images"):
        image = golden.image(name)
        inputs = family.vision_inputs(image.pixel_values, image.grid_thw, model)
        if module is None:
            settings = runtime_settings(bundle, "vision")
            module = Module(bundle / "visual.mnn", list(inputs), family.vision_outputs, settings, threads)
        seen = module([np.ascontiguousarray(array) for array in inputs.values()])
        yield name, family.as_rows(seen)
