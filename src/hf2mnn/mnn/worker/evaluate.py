"""Run a bundle on all examples, probes and images of a reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf2mnn.core.progress import steps
from hf2mnn.mnn.template import engine_messages
from hf2mnn.mnn.worker.module import Module, runtime_settings
from hf2mnn.mnn.worker.session import ModelSession, engine_image
from hf2mnn.reference.cache_fill import logits_by_fill
from hf2mnn.reference.golden import Golden, GoldenExample, GoldenProbe


def _cache_logits(session: ModelSession, golden: Golden, probe: GoldenProbe) -> dict[str, np.ndarray]:
    """Return logits of a probe's text after its images, by the way in which the KV cache is filled."""
    before, ids = probe.split_after_images(session.info.get("image_token_id"))
    images = [engine_image(golden.image(name).resized) for name in probe.images]
    first = int(probe.position_ids[0, len(before)])
    cached: list[int] = []  # `truncate` takes effect with the next forward, so the text in the cache is recorded here

    def start() -> None:
        cached.clear()
        session.prefill_images(probe.ids.tolist(), probe.position_ids, images)

    def feed(tokens: list[int]) -> np.ndarray:
        # A single token after others is a decoding step; the rest is prefill, one position a token.
        decoding = len(tokens) == 1 and cached
        rows = session.forward(tokens) if decoding else session.all_logits(tokens, first + len(cached))
        cached.extend(tokens)
        return rows

    def forget(count: int) -> None:
        del cached[len(cached) - count :]
        session.truncate(len(before) + len(cached))

    return logits_by_fill(ids, start, feed, forget)


def _as_called(session: ModelSession, example: GoldenExample, images: list[np.ndarray], limit: int) -> dict[str, Any]:
    """Run an example as an application does, on its original images: the engine's template, resizing and positions.

    Return `written`, the prompt by the engine's template; `answer`, ids of the answer to it; `prompt`, ids by the
    engine's tokenizer of the reference prompt.
    """
    written = session.native.apply_chat_template(engine_messages(example.messages))
    tagged, reference = session.tagged(written), session.tagged(example.prompt)
    inputs = [engine_image(rgb) for rgb in images]
    # The engine has no answer to an empty prompt.
    ids, answer = session.generate(tagged, inputs, limit) if written.strip() else ([], [])
    if tagged != reference:
        ids = session.encode(reference, inputs)
    return {"written": written, "prompt": ids, "answer": answer}


def _vision_embeds(session: ModelSession, golden: Golden) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and embeddings (float32 [rows, hidden]) of each image by the vision tower on transformers' pixels."""
    family, folder, module = session.family, session.folder, None
    for name in steps("MNN vision tower", golden.image_names(), "images"):
        image = golden.image(name)
        inputs = family.vision_inputs(image.pixel_values, image.grid_thw, session.info)
        if module is None:
            settings = runtime_settings(folder, "vision")
            module = Module(folder / "visual.mnn", list(inputs), family.vision_outputs, settings)
        yield name, family.concat_outputs(module(list(inputs.values())))


def run(job: dict[str, Any]) -> None:
    """Write tensors to job["result"] (safetensors) and token ids by example to job["called"] (JSON)."""
    session, golden = ModelSession(Path(job["bundle"]), job["threads"]), Golden(Path(job["reference"]))
    tensors, called, limit = {}, {}, job["max_new_tokens"]
    for example in steps("MNN answers", golden.examples(), "examples", len(golden.records)):
        images = [golden.image(name) for name in example.images]
        rows, greedy = session.evaluate(example, [engine_image(image.resized) for image in images], limit)
        tensors[f"examples/{example.id}/logits"] = rows
        tensors[f"examples/{example.id}/greedy_ids"] = np.array(greedy, np.int64)
        called[example.id] = _as_called(session, example, [image.original for image in images], limit)
    for probe in golden.probes():
        for way, rows in _cache_logits(session, golden, probe).items():
            tensors[f"parity/{probe.kind}/{way}"] = rows
    for name, embeds in _vision_embeds(session, golden):
        tensors[f"images/{name}/embeds"] = embeds
    save_file(tensors, job["result"])
    Path(job["called"]).write_text(json.dumps(called))
