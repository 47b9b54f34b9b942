"""The bundle's vision tower alone: transformers' own pixels can be given to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hf2mnn.families import Family
from hf2mnn.mnn.worker.module import Module, runtime_settings
from hf2mnn.progress import steps
from hf2mnn.reference.golden import Golden


def vision_embeds(
    bundle: Path, golden: Golden, family: Family, merge_size: int, threads: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Each picture's embeddings float32 [image tokens, hidden]."""
    module = None
    for name in steps("MNN sees", golden.picture_names(), "pictures"):
        picture = golden.picture(name)
        inputs = family.vision_inputs(picture.pixel_values, picture.grid_thw, merge_size)
        if module is None:
            settings = runtime_settings(bundle, "vision")
            module = Module(bundle / "visual.mnn", list(inputs), ["image_embeds"], settings, threads)
        (seen,) = module([np.ascontiguousarray(array) for array in inputs.values()])
        yield name, seen.reshape(-1, seen.shape[-1])
