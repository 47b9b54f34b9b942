"""Logits of a bundle under given settings, for comparison with those under other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.engine_facts import IMAGE_TAG
from hf2mnn.mnn.worker.session import ModelSession, engine_image


def colored_fields(session: ModelSession, side: int) -> np.ndarray:
    """Return an image of 4 x 4 fields of random colors, uint8 RGB [height, width, 3]."""
    width, height = session.family.image_size(side, side, session.info)
    fields = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return fields[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width]


def run(job: dict[str, Any]) -> None:
    """Write logits float32 [positions, vocabulary] to job["logits"] (npy).

    For each prompt there is one row after it, and one after each token of its answer but the last. Answers are read
    from job["answers"] (JSON); where the file does not exist, they are generated and written.

    job: bundle, settings, prompts (a text, and whether an image precedes it), image_side, limit (tokens of an answer),
    answers, logits.
    """
    session = ModelSession(Path(job["bundle"]), settings=job["settings"])
    path, rows = Path(job["answers"]), []
    answers = json.loads(path.read_text()) if path.exists() else []
    stored = bool(answers)
    for index, (text, with_image) in enumerate(job["prompts"]):
        arrays = [colored_fields(session, job["image_side"])] if with_image and session.family.has_vision else []
        images = [engine_image(rgb) for rgb in arrays]
        ids = session.encode(session.native.apply_chat_template(IMAGE_TAG.format(0) * len(images) + text), images)
        positions = session.positions(ids, arrays)
        if not stored:
            answers.append(session.greedy(session.prefill(ids, positions, images), job["limit"]))
        rows.append(session.forced(ids, positions, images, answers[index]))
    path.write_text(json.dumps(answers))
    np.save(job["logits"], np.concatenate(rows))
