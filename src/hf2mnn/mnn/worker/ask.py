"""Answer one conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.template import engine_messages
from hf2mnn.mnn.worker.session import ModelSession, engine_image


def run(job: dict[str, Any]) -> None:
    """Write the text of the answer to job["result"] (JSON)."""
    session, limit = ModelSession(Path(job["bundle"]), job["threads"]), job["max_new_tokens"]
    arrays = [np.load(path) for path in job["images"]]
    images = [engine_image(rgb) for rgb in arrays]
    if job["as_called"]:
        prompt = session.native.apply_chat_template(engine_messages(job["messages"]))
        _, answer = session.generate(session.tagged(prompt), images, limit)
    else:
        ids = session.encode(session.tagged(job["prompt"]), images)
        answer = session.greedy(session.prefill(ids, session.positions(ids, arrays), images), limit)
    Path(job["result"]).write_text(json.dumps({"text": session.decode(answer)}))
