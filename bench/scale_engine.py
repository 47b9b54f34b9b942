"""One measurement of one bundle, hf2mnn's or llmexport's, in a process of its own: `run_worker` calls `run`.

Nothing here knows who made the bundle: it is what an application does with `MNN.llm`, the same tokens for all.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import MNN.llm
import numpy as np

from hf2mnn.machine.usage import resident_mb
from hf2mnn.mnn.worker.module import Refused
from hf2mnn.mnn.worker.overlay import overlay
from hf2mnn.mnn.worker.session import GARBAGE, image_input

CLOCK = time.perf_counter


def run(job: dict[str, Any]) -> None:
    """Figures by name into job["result"] (JSON).

    job: bundle, settings (over config.json's, for the vision tower too), prompt and answer (token ids), image (its
    sides in pixels, 0 for none), result. The peak is that of the whole process before it has seen the image.
    """
    started = CLOCK()
    llm = MNN.llm.create(str(overlay(Path(job["bundle"]), job["settings"]) / "config.json"))
    if not llm._c_obj.load():
        raise Refused(f"MNN's engine does not load {job['bundle']}")
    figures = {"load_s": CLOCK() - started}

    def seconds(ids: list[int]) -> float:
        begun = CLOCK()
        row = llm.forward(ids).read().reshape(-1)
        row.argmax()
        taken = CLOCK() - begun
        if not np.isfinite(row).all() or np.abs(row).max() > GARBAGE:
            raise Refused(f"{job['bundle']} answers garbage")
        return taken

    prompt, answer = job["prompt"], job["answer"]
    for _ in range(2):  # once to warm up
        llm.reset()
        figures["prefill_tokens_s"] = len(prompt) / seconds(prompt)
    figures["decode_tokens_s"] = len(answer) / sum(seconds([token]) for token in answer)
    figures["peak_rss_mb"] = resident_mb("VmHWM")
    if side := job["image"]:
        rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        seen = {"text": "<img>image_0</img>", "images": [image_input(rgb)]}
        for _ in range(2):
            begun = CLOCK()
            tokens = llm.tokenizer_encode(seen)
            figures["image_s"] = CLOCK() - begun
        if len(tokens) < 3:
            raise Refused(f"{job['bundle']} makes no image tokens of an image")
    Path(job["result"]).write_text(json.dumps(figures))
