"""Everything that the comparison wants to know of one bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf2mnn.core.progress import steps
from hf2mnn.mnn.template import engine_messages
from hf2mnn.mnn.worker.session import Engine, image_input, tag_images
from hf2mnn.mnn.worker.vision import vision_embeds
from hf2mnn.reference.cache_fill import ways_of_feeding
from hf2mnn.reference.golden import Golden, GoldenExample, GoldenProbe


def _parity(engine: Engine, golden: Golden, probe: GoldenProbe) -> dict[str, np.ndarray]:
    """Logits of a probe's text after its images, by the way it came into the cache."""
    read, ids = probe.after_images(engine.model.get("image_token_id"))
    images = [image_input(golden.image(name).resized) for name in probe.images]
    first, fed = int(probe.position_ids[0, len(read)]), 0
    # The engine forgets only with its next forward, and until then counts what it is to forget: so it is counted here.

    def start() -> None:
        nonlocal fed
        fed = 0
        engine.read_images(probe.ids.tolist(), probe.position_ids, images)

    def feed(tokens: list[int]) -> np.ndarray:
        nonlocal fed
        # A single token after others is decoding, as the engine does it; all else is text at one position a token.
        decoding = len(tokens) == 1 and fed > 0
        rows = engine.logits(tokens)[None] if decoding else engine.all_logits(tokens, first + fed)
        fed += len(tokens)
        return rows

    def forget(count: int) -> None:
        nonlocal fed
        fed -= count
        engine.truncate(len(read) + fed)

    return ways_of_feeding(ids, start, feed, forget)


def _as_called(engine: Engine, example: GoldenExample, images: list[np.ndarray], limit: int) -> dict[str, Any]:
    """written: the prompt that the engine makes of the conversation; answer: ids of its answer to that; prompt: those
    that its tokenizer makes of the right prompt. `images` are uint8 RGB [height, width, 3].
    """
    written = engine.native.apply_chat_template(engine_messages(example.messages))
    tagged, right = (tag_images(prompt, engine.family.image_text) for prompt in (written, example.prompt))
    given = [image_input(rgb) for rgb in images]
    # Of no prompt the engine makes no answer.
    asked, answered = engine.as_called(tagged, given, limit) if written.strip() else ([], [])
    if tagged != right:
        asked = engine.encode(right, given)
    return {"written": written, "prompt": asked, "answer": answered}


def run(job: dict[str, Any]) -> None:
    """Tensors into job["result"] (safetensors), token ids by example into job["called"] (JSON)."""
    bundle, golden, limit = Path(job["bundle"]), Golden(Path(job["reference"])), job["max_new_tokens"]
    engine = Engine(bundle, job["threads"])
    tensors, called = {}, {}
    for example in steps("MNN answers", golden.examples(), "examples", len(golden.records)):
        images = [golden.image(name) for name in example.images]
        rows, greedy = engine.judge(example, [image_input(image.resized) for image in images], limit)
        tensors[f"examples/{example.id}/logits"] = rows
        tensors[f"examples/{example.id}/greedy_ids"] = np.array(greedy, np.int64)
        called[example.id] = _as_called(engine, example, [image.original for image in images], limit)
    for probe in golden.probes():
        for way, rows in _parity(engine, golden, probe).items():
            tensors[f"parity/{probe.kind}/{way}"] = rows
    for name, embeds in vision_embeds(bundle, golden, engine.family, engine.model, job["threads"]):
        tensors[f"images/{name}/embeds"] = embeds
    save_file(tensors, job["result"])
    Path(job["called"]).write_text(json.dumps(called))
