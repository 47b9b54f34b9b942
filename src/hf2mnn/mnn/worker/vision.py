"""The bundle's vision tower alone, by MNN's module API: any pixels can be given to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import MNN.expr
import MNN.nn
import numpy as np

from hf2mnn.mnn.worker.session import LEVELS, Engine, vision_settings
from hf2mnn.reference.golden import Golden


def vision_embeds(bundle: Path, engine: Engine, golden: Golden, threads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each picture's embeddings [image tokens, hidden]: transformers' own pixels, the bundle's vision tower."""
    chosen = vision_settings(bundle)
    settings = {
        "backend": 0,
        "numThread": threads or chosen.get("thread_num", 4),
        "precision": LEVELS[chosen.get("precision", "normal")],
        "memory": LEVELS[chosen.get("memory", "normal")],
    }
    runtime, module = MNN.nn.create_runtime_manager((settings,)), None
    kinds = {"float32": MNN.expr.float, "int32": MNN.expr.int}
    for name in golden.picture_names():
        picture = golden.picture(name)
        inputs = engine.family.vision_inputs(picture.pixel_values, picture.grid_thw, engine.model["merge_size"])
        if module is None:
            path = str(bundle / "visual.mnn")
            module = MNN.nn.load_module_from_file(path, list(inputs), ["image_embeds"], runtime_manager=runtime)
        fed = [MNN.expr.const(a, list(a.shape), MNN.expr.NCHW, kinds[a.dtype.name]) for a in inputs.values()]
        seen = np.array(module.onForward(fed)[0].read(), np.float32)
        yield name, seen.reshape(-1, seen.shape[-1])
