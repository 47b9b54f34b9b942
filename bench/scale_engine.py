"""Engine measurement of one bundle in its own process; `hf2mnn.mnn.engine.run_worker` calls `run`.

It uses `MNN.llm` as an application does, and is the same for bundles of hf2mnn and llmexport.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import MNN.llm
import numpy as np

from hf2mnn.core.errors import BundleFault
from hf2mnn.machine.usage import own_peak_mb
from hf2mnn.mnn.engine_facts import GARBAGE_LOGIT, IMAGE_TAG
from hf2mnn.mnn.worker.session import engine_image, overlay

CLOCK = time.perf_counter


def run(job: dict[str, Any]) -> None:
    """Write figures by name to the file job["result"] (JSON).

    Args:
        job: bundle; settings, which replace those of config.json, for the vision tower too; prompt and answer, token
            ids; image, its side in pixels, 0 for none; result. `peak_rss_mb` is the peak of the process before the
            image.
    """
    started = CLOCK()
    llm = MNN.llm.create(str(overlay(Path(job["bundle"]), job["settings"]) / "config.json"))
    if not llm._c_obj.load():
        raise BundleFault(f"MNN's engine cannot load {job['bundle']}")
    figures = {"load_s": CLOCK() - started}

    def forward_seconds(ids: list[int]) -> float:
        begin = CLOCK()
        logits = llm.forward(ids).read().reshape(-1)
        logits.argmax()
        elapsed = CLOCK() - begin
        if not np.isfinite(logits).all() or np.abs(logits).max() > GARBAGE_LOGIT:
            raise BundleFault(f"{job['bundle']} gives garbage logits")
        return elapsed

    prompt, answer = job["prompt"], job["answer"]
    for _ in range(2):  # the first run warms up
        llm.reset()
        figures["prefill_tokens_s"] = len(prompt) / forward_seconds(prompt)
    figures["decode_tokens_s"] = len(answer) / sum(forward_seconds([token]) for token in answer)
    figures["peak_rss_mb"] = own_peak_mb()
    if side := job["image"]:
        rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        prompt_with_image = {"text": IMAGE_TAG.format(0), "images": [engine_image(rgb)]}
        for _ in range(2):
            begin = CLOCK()
            tokens = llm.tokenizer_encode(prompt_with_image)
            figures["image_s"] = CLOCK() - begin
        if len(tokens) < 3:
            raise BundleFault(f"{job['bundle']} encodes an image to no image tokens")
    Path(job["result"]).write_text(json.dumps(figures))
