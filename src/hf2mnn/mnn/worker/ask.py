"""One prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.worker.session import Engine, picture_grid, picture_input


def run(job: dict[str, Any]) -> None:
    """The answer's text into job["result"] (JSON)."""
    engine, limit = Engine(Path(job["bundle"]), job["threads"]), job["max_new_tokens"]
    arrays = [np.load(path) for path in job["pictures"]]
    pictures = [picture_input(rgb) for rgb in arrays]
    tags = "".join(f"<img>image_{index}</img>" for index in range(len(pictures)))
    prompt = engine.native.apply_chat_template(tags + job["prompt"])
    if job["as_called"]:
        _, answer = engine.as_called(prompt, pictures, limit)
    else:
        ids = engine.llm.tokenizer_encode({"text": prompt, "images": pictures})
        grids = [picture_grid(rgb, engine.model) for rgb in arrays]
        positions = engine.family.position_ids(np.array(ids), grids, engine.model)
        answer = engine.greedy(engine.prefill(ids, positions, pictures), limit)
    Path(job["result"]).write_text(json.dumps({"text": engine.decode(answer)}))
