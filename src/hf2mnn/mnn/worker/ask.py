"""One conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.template import engine_messages
from hf2mnn.mnn.worker.session import Engine, image_grid, image_input, tag_images


def run(job: dict[str, Any]) -> None:
    """The answer's text into job["result"] (JSON)."""
    engine, limit = Engine(Path(job["bundle"]), job["threads"]), job["max_new_tokens"]
    arrays = [np.load(path) for path in job["images"]]
    images = [image_input(rgb) for rgb in arrays]
    if job["as_called"]:
        prompt = engine.native.apply_chat_template(engine_messages(job["messages"]))
        _, answer = engine.as_called(tag_images(prompt, engine.family.image_text), images, limit)
    else:
        prompt = tag_images(job["prompt"], engine.family.image_text)
        ids = engine.encode(prompt, images)
        grids = [image_grid(rgb, engine.model) for rgb in arrays]
        positions = engine.family.position_ids(np.array(ids), grids, engine.model)
        answer = engine.greedy(engine.prefill(ids, positions, images), limit)
    Path(job["result"]).write_text(json.dumps({"text": engine.decode(answer)}))
