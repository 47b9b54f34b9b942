"""A bundle asked as a user of the engine would ask it, whoever made it: no key of ours, no positions set right."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.template import render
from hf2mnn.mnn.worker.session import Loaded, image_input

SIDE = 84
"""Pixels of an image that every vision tower of the Qwen-VL families takes as it is (patches of 14, merged by two)."""
SETTINGS = {"sampler_type": "greedy", "thread_num": 2}


def image() -> np.ndarray:
    """uint8 RGB [SIDE, SIDE, 3]: a red square on white."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = (220, 30, 30)
    return pixels


def answer(engine: Loaded, prompt: str, images: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """ids: of the prompt; answer: ids of the answer; text; longest: of its runs of one token.

    Raises:
        Refused: the logits after the prompt are no logits.
    """
    engine.llm.reset()
    engine.llm.generate_init()
    engine.logits(engine.encode(prompt, images))
    ids, tokens = engine.as_called(prompt, images, limit)
    longest = max((len(list(run)) for _, run in groupby(tokens)), default=0)
    return {"ids": ids, "answer": tokens, "text": engine.decode(tokens), "longest": longest}


def run(job: dict[str, Any]) -> None:
    """Into job["result"] (JSON), step by step, so that what was reached is known when the engine dies: `step` (load,
    template, text, image, done), `template` (the chat as the engine and as Jinja render it), `text`, `image`.

    job: bundle, prompt, chat, template ("" for none), tokens (eos_token, bos_token), visual, max_new_tokens, result.
    """
    found: dict[str, Any] = {}

    def reach(step: str) -> None:
        found["step"] = step
        Path(job["result"]).write_text(json.dumps(found))

    reach("load")
    engine, limit = Loaded(Path(job["bundle"]), settings=SETTINGS), job["max_new_tokens"]
    prompt, tag = job["prompt"], "<img>image_0</img>"
    seen = tag + prompt
    if job["template"]:
        reach("template")
        right = render(job["template"], job["chat"], job["tokens"])
        found["template"] = [engine.native.apply_chat_template(job["chat"]), right]
        prompt, seen = engine.native.apply_chat_template(prompt), engine.native.apply_chat_template(seen)
    reach("text")
    found["text"] = answer(engine, prompt, [], limit)
    if job["visual"]:
        reach("image")
        found["image"] = answer(engine, seen, [image_input(image())], limit)
    reach("done")
