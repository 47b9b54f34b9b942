"""One measurement of one bundle, in its own process: memory is the bundle's, and only the file cache is warm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hf2mnn.core.errors import BundleFault
from hf2mnn.machine.usage import own_peak_mb, resident_mb
from hf2mnn.mnn.bundle_config import decoder_settings, vision_settings
from hf2mnn.mnn.engine_facts import IMAGE_TAG
from hf2mnn.mnn.worker.module import Module, runtime_settings
from hf2mnn.mnn.worker.session import ModelSession, engine_image

ROUNDS = 3  # of a measurement after one for warm-up; the median counts
BUDGET = 3.0  # seconds after which no further round begins
CLOCK = time.perf_counter


def rounds(measure: Callable[[], Any]) -> list[Any]:
    """Run `measure` once for warm-up, and then as often as ROUNDS and BUDGET allow; return the results."""
    measure()
    started, results = CLOCK(), [measure()]
    while len(results) < ROUNDS and CLOCK() - started < BUDGET:
        results.append(measure())
    return results


def seconds(action: Callable[[], Any]) -> float:
    """Return the duration of `action`."""
    started = CLOCK()
    action()
    return CLOCK() - started


def plain_tokens(session: ModelSession, count: int) -> list[int]:
    """Return ids of ordinary text, the same at every call: no special tokens, which decode to an empty text."""
    random, ids, tried = np.random.default_rng(0), [], 0
    while len(ids) < count:
        if tried > 20 * count + 1000:
            raise BundleFault(
                "the bundle's tokenizer decodes hardly any id of the vocabulary: it is of another model", "vocabulary"
            )
        token, tried = int(random.integers(session.info["vocab_size"])), tried + 1
        if token not in session.info["stop_ids"] and session.decode([token]):
            ids.append(token)
    return ids


class TimedSession(ModelSession):
    """A session whose steps return the seconds that they take."""

    def step(self, ids: list[int]) -> tuple[float, np.ndarray]:
        """Return the duration of a forward with the choice of the best token, and its logits [vocabulary]."""
        started = CLOCK()
        row = self.llm.forward(ids).read().reshape(-1)
        row.argmax()
        # A copy, because the engine reuses the memory of its logits.
        return CLOCK() - started, row.copy()

    def first_step(self, ids: list[int]) -> tuple[float, np.ndarray]:
        """Return the same for an empty KV cache."""
        self.llm.reset()
        return self.step(ids)

    def request(self, prompt: list[int], answer: list[int]) -> tuple[float, float]:
        """Return the durations of the prefill and of all decoding steps; the ids of the answer are given."""
        first, _ = self.first_step(prompt)
        return first, sum(self.step([token])[0] for token in answer)

    def cache_gain(self, ids: list[int]) -> dict[str, Any]:
        """Compare decoding the last of `ids` with a KV cache of the others to a prefill of all of them.

        Both give the same logits; `difference` is the largest difference between the two.
        """
        recomputed = rounds(lambda: self.first_step(ids))
        self.first_step(ids[:-1])

        def step() -> tuple[float, np.ndarray]:
            result = self.step(ids[-1:])
            self.native.erase_history(len(ids) - 1, 0)
            return result

        cached = rounds(step)
        return {
            "length": len(ids) - 1,
            "cached_s": median(duration for duration, _ in cached),
            "recomputed_s": median(duration for duration, _ in recomputed),
            "difference": float(np.abs(cached[0][1] - recomputed[0][1]).max()),
        }

    def text_measures(self, prompt: list[int], answer: list[int]) -> dict[str, float]:
        """Return speeds of a text request: tokenizer, prefill and decoding."""
        self.llm.reset()
        self.logits(prompt)  # raises for garbage
        # Encoding the text of ids may give other ids, so the tokenizer is timed separately.
        text = self.decode(prompt)
        tokenized = median(rounds(lambda: seconds(lambda: self.llm.tokenizer_encode(text))))
        prefill, decode = map(median, zip(*rounds(lambda: self.request(prompt, answer)), strict=True))
        return {
            "first_token_s": tokenized + prefill,
            "prefill_s": prefill,
            "prefill_tokens_per_s": len(prompt) / prefill,
            "decode_s": decode,
            "decode_tokens_per_s": len(answer) / decode,
        }


def image_seconds(session: ModelSession, width: int, height: int) -> float:
    """Return the duration of the engine's processing of an image: normalization, patches and vision tower."""
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    prompt = {"text": IMAGE_TAG.format(0), "images": [engine_image(rgb)]}
    return median(rounds(lambda: seconds(lambda: session.llm.tokenizer_encode(prompt))))


def tower_seconds(session: ModelSession, width: int, height: int) -> float:
    """Return the duration of the vision tower alone, from patches to embeddings."""
    info = session.info
    patch = info["patch_size"]
    grid = np.array([1, height // patch, width // patch])
    shape = (int(grid.prod()), 3 * info["temporal_patch_size"] * patch**2)
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
    inputs = session.family.vision_inputs(pixels, grid, info)
    settings = runtime_settings(session.folder, "vision")
    module = Module(session.folder / "visual.mnn", list(inputs), session.family.vision_outputs, settings)
    return median(rounds(lambda: seconds(lambda: module(list(inputs.values())))))


def run(job: dict[str, Any]) -> None:
    """Write measures by name, the gain of the KV cache by length, the settings and the image size to job["result"].

    Peak memory does not include the second copy of the vision tower, which is timed alone.

    job: bundle, settings (that replace those of config.json), prompt_tokens, answer_tokens, image_side (pixels),
    lengths, result (JSON).
    """
    base, started = resident_mb(), CLOCK()
    session = TimedSession(Path(job["bundle"]), settings=job["settings"])
    measures = {"load_s": CLOCK() - started}
    prompt, request = job["prompt_tokens"], job["prompt_tokens"] + job["answer_tokens"]
    ids = plain_tokens(session, max([request, *(length + 1 for length in job["lengths"])]))
    measures |= session.text_measures(ids[:prompt], ids[prompt:request])
    cache = [session.cache_gain(ids[: length + 1]) for length in job["lengths"]]
    image = None
    if session.family.has_vision:
        image = session.family.image_size(job["image_side"], job["image_side"], session.info)
        measures["image_s"] = image_seconds(session, *image)
    peak = own_peak_mb()
    if image:
        measures["vision_s"] = tower_seconds(session, *image)
    if peak is not None:
        measures |= {"base_mb": base, "peak_mb": peak, "bundle_mb": peak - base}
    config = json.loads((session.folder / "config.json").read_text())
    engine = {"decoder": decoder_settings(config), "vision": vision_settings(config)}
    result = {"measures": measures, "cache": cache, "engine": engine, "image": image}
    Path(job["result"]).write_text(json.dumps(result))
