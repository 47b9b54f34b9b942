"""Ask any bundle a question as an application does: no keys of hf2mnn, the engine's own positions."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.engine_facts import IMAGE_TAG
from hf2mnn.mnn.template import render
from hf2mnn.mnn.worker.session import EngineSession, Images, engine_image

SIDE = 84  # pixels of an image that no Qwen-VL family resizes (patches of 14, merged by two)
SETTINGS = {"sampler_type": "greedy", "thread_num": 2}


def red_square() -> np.ndarray:
    """Return a red square on white, uint8 RGB [SIDE, SIDE, 3]."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = (220, 30, 30)
    return pixels


def answer(session: EngineSession, prompt: str, images: Images, limit: int) -> dict[str, Any]:
    """Return `ids` of a prompt, `answer` (ids), its `text`, and the length of the `longest` run of one token in it."""
    session.llm.reset()
    session.llm.generate_init()
    session.logits(session.encode(prompt, images))
    ids, tokens = session.generate(prompt, images, limit)
    longest = max((len(list(run)) for _, run in groupby(tokens)), default=0)
    return {"ids": ids, "answer": tokens, "text": session.decode(tokens), "longest": longest}


def run(job: dict[str, Any]) -> None:
    """Write results to job["result"] (JSON) after each step, so that they remain if the engine crashes.

    Results: `step` (load, template, text, image or done), `template` (the chat by the engine and by Jinja), `text` and
    `image` (as `answer` returns them).

    job: bundle, prompt, chat, template ("" for none), tokens (eos_token, bos_token), visual, max_new_tokens, result.
    """
    results: dict[str, Any] = {}

    def begin(step: str) -> None:
        results["step"] = step
        Path(job["result"]).write_text(json.dumps(results))

    begin("load")
    session, limit = EngineSession(Path(job["bundle"]), settings=SETTINGS), job["max_new_tokens"]
    prompt = job["prompt"]
    image_prompt = IMAGE_TAG.format(0) + prompt
    if job["template"]:
        begin("template")
        expected = render(job["template"], job["chat"], job["tokens"])
        results["template"] = [session.native.apply_chat_template(job["chat"]), expected]
        prompt, image_prompt = map(session.native.apply_chat_template, (prompt, image_prompt))
    begin("text")
    results["text"] = answer(session, prompt, [], limit)
    if job["visual"]:
        begin("image")
        results["image"] = answer(session, image_prompt, [engine_image(red_square())], limit)
    begin("done")
