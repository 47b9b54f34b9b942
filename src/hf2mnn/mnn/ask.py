"""Ask a finished bundle something, as an application would."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hf2mnn.errors import BundleError
from hf2mnn.families import family_named
from hf2mnn.mnn.bundle import MODEL_CONFIG
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.mnn.paths import read_config
from hf2mnn.reference.examples import read_picture
from hf2mnn.source.facts import check_facts


def ask_bundle(
    bundle: Path,
    prompt: str,
    images: list[Path],
    max_new_tokens: int = 512,
    threads: int = 0,
    time_limit: float = 600,
    as_called: bool = False,
) -> str:
    """The engine's greedy answer as text.

    Pictures are resized as the checkpoint's processor would, and tokens after one get their right positions; with
    `as_called` both are left to the engine, whose ways of doing so differ.

    Raises:
        BundleError, EngineError: the bundle is not whole, or the engine failed on it.
        EvaluationSetError: an image is not one.
    """
    folder = check_bundle(bundle)
    model = read_config(folder, MODEL_CONFIG).get("hf2mnn")
    if not isinstance(model, dict):
        raise BundleError(f"{folder} was not made by hf2mnn: its {MODEL_CONFIG} does not say which model it is")
    check_facts(model, folder / MODEL_CONFIG)
    family = family_named(model.get("model_type"), folder)
    with tempfile.TemporaryDirectory(prefix="hf2mnn-ask-") as scratch:
        pictures = []
        for index, image in enumerate(images):
            path, picture = Path(scratch, f"{index}.npy"), read_picture(image)
            if not as_called:
                size = family.picture_size(picture.width, picture.height, model)
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            np.save(path, np.array(picture))
            pictures.append(str(path))
        result = Path(scratch, "answer.json")
        job = {
            "bundle": str(folder),
            "prompt": prompt,
            "pictures": pictures,
            "max_new_tokens": max_new_tokens,
            "threads": threads,
            "as_called": as_called,
            "result": str(result),
        }
        run_worker("hf2mnn.mnn.worker.ask", job, time_limit)
        return json.loads(result.read_text())["text"]
