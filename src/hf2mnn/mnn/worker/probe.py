"""What a bundle predicts under some settings, to be held against its predictions under others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.worker.session import Engine, image_grid, image_input


def coloured_fields(engine: Engine, side: int) -> np.ndarray:
    """An image, uint8 RGB: fields of one colour each, so that there is something to be told apart."""
    width, height = engine.family.image_size(side, side, engine.model)
    fields = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return fields[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]


def run(job: dict[str, Any]) -> None:
    """Logits float32 [positions, vocabulary] into job["logits"] (npy): for each prompt one row after it, and one after
    each token of its answer but the last.

    job: bundle, settings, prompts (a text, and whether an image comes before it), image_side, limit (tokens of an
    answer), answers (JSON), logits. The answers are the engine's own and are written, or, where they are there, read.
    """
    bundle, path = Path(job["bundle"]), Path(job["answers"])
    engine = Engine(bundle, settings=job["settings"])
    answers = json.loads(path.read_text()) if path.exists() else []
    known, rows = bool(answers), []
    prompts = [(text, imaged and engine.family.sees) for text, imaged in job["prompts"]]
    if engine.family.sees:
        rgb = coloured_fields(engine, job["image_side"])
        image, grid = image_input(rgb), image_grid(rgb, engine.model)
    for index, (text, imaged) in enumerate(prompts):
        images = [image] if imaged else []
        prompt = engine.native.apply_chat_template("<img>image_0</img>" * len(images) + text)
        ids = engine.encode(prompt, images)
        positions = engine.family.position_ids(np.array(ids), [grid] * len(images), engine.model)
        if not known:
            answers.append(engine.greedy(engine.prefill(ids, positions, images), job["limit"]))
        rows.append(engine.prefill(ids, positions, images))
        rows += [engine.logits([token]) for token in answers[index][:-1]]
    path.write_text(json.dumps(answers))
    np.save(job["logits"], np.stack(rows))
