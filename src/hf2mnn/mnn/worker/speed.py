"""One measurement of one bundle: a process of its own, so that its memory is the bundle's and nothing is warm from
before but the file system's cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hf2mnn.machine.usage import resident_mb
from hf2mnn.mnn.settings import engine_settings, vision_settings
from hf2mnn.mnn.worker.module import Module, runtime_settings
from hf2mnn.mnn.worker.session import Engine, Refused, image_input

ROUNDS, BUDGET = 3, 3.0
"""After one round to warm up: rounds of a small model, whose median counts; no new one begins after so many seconds."""
CLOCK = time.perf_counter


def rounds(measure: Callable[[], Any]) -> list[Any]:
    """What `measure` gives, once for nothing and then as often as ROUNDS and BUDGET allow."""
    measure()
    started, results = CLOCK(), [measure()]
    while len(results) < ROUNDS and CLOCK() - started < BUDGET:
        results.append(measure())
    return results


def seconds(action: Callable[[], Any]) -> float:
    started = CLOCK()
    action()
    return CLOCK() - started


def plain_tokens(engine: Engine, count: int) -> list[int]:
    """Ids of ordinary text, the same at every call: none that a chat template, an image or a stop uses.

    Special tokens, and rows of the embedding that no token has, decode to nothing.
    """
    random, found, tried = np.random.default_rng(0), [], 0
    while len(found) < count:
        if tried > 20 * count + 1000:
            raise Refused("the bundle's tokenizer knows hardly any of the vocabulary: it is not the model's")
        token, tried = int(random.integers(engine.model["vocab_size"])), tried + 1
        if token not in engine.model["stop_ids"] and engine.decode([token]):
            found.append(token)
    return found


class Clocked:
    """The engine's steps, each with the seconds that it took."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def choose(self, ids: list[int]) -> tuple[float, np.ndarray]:
        """One forward, and the best token of its logits [vocabulary], which are given too."""
        started = CLOCK()
        row = self.engine.llm.forward(ids).read().reshape(-1)
        row.argmax()
        # A copy, because the engine writes its next logits into the same place.
        return CLOCK() - started, row.copy()

    def prefill(self, ids: list[int]) -> tuple[float, np.ndarray]:
        """The same from an empty cache."""
        self.engine.llm.reset()
        return self.choose(ids)

    def request(self, prompt: list[int], answer: list[int]) -> tuple[float, float]:
        """(prefill of the prompt, all steps of the answer); the answer's tokens are given, so that none ends it."""
        first, _ = self.prefill(prompt)
        return first, sum(self.choose([token])[0] for token in answer)

    def cache_worth(self, ids: list[int]) -> dict[str, Any]:
        """The last token of `ids` decoded with a cache of those before it, against a prefill of all of them.

        Both end in the same logits; `difference` is the largest between the two.
        """
        length = len(ids) - 1
        recomputed = rounds(lambda: self.prefill(ids))
        self.prefill(ids[:-1])

        def step() -> tuple[float, np.ndarray]:
            taken = self.choose(ids[-1:])
            self.engine.native.erase_history(length, 0)
            return taken

        cached = rounds(step)
        return {
            "length": length,
            "cached_s": median(taken for taken, _ in cached),
            "recomputed_s": median(taken for taken, _ in recomputed),
            "difference": float(np.abs(cached[0][1] - recomputed[0][1]).max()),
        }


def text_measures(clocked: Clocked, ids: list[int], prompt_tokens: int) -> dict[str, float]:
    engine, prompt, answer = clocked.engine, ids[:prompt_tokens], ids[prompt_tokens:]
    engine.llm.reset()
    engine.logits(prompt)  # says so where the answer is garbage
    # The ids of a text are not the ids whose text it is, so the tokenizer is timed apart.
    text = engine.decode(prompt)
    tokenized = median(rounds(lambda: seconds(lambda: engine.llm.tokenizer_encode(text))))
    prefills, decodes = zip(*rounds(lambda: clocked.request(prompt, answer)), strict=True)
    prefill, decode = median(prefills), median(decodes)
    return {
        "first_token_s": tokenized + prefill,
        "prefill_s": prefill,
        "prefill_tokens_per_s": len(prompt) / prefill,
        "decode_s": decode,
        "decode_tokens_per_s": len(answer) / decode,
    }


def image_seconds(engine: Engine, width: int, height: int) -> float:
    """The engine's own way with an image of the right size: normalization, patches and vision tower."""
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    prompt = {"text": "<img>image_0</img>", "images": [image_input(rgb)]}
    return median(rounds(lambda: seconds(lambda: engine.llm.tokenizer_encode(prompt))))


def tower_seconds(engine: Engine, width: int, height: int) -> float:
    """The vision tower alone, from patches to embeddings."""
    model = engine.model
    patch = model["patch_size"]
    grid = np.array([1, height // patch, width // patch])
    shape = (int(grid.prod()), 3 * model["temporal_patch_size"] * patch**2)
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
    inputs = engine.family.vision_inputs(pixels, grid, model)
    module = Module(
        engine.folder / "visual.mnn",
        list(inputs),
        engine.family.vision_outputs,
        runtime_settings(engine.folder, "vision"),
        0,
    )
    arrays = [np.ascontiguousarray(array) for array in inputs.values()]
    return median(rounds(lambda: seconds(lambda: module(arrays))))


def run(job: dict[str, Any]) -> None:
    """Into job["result"] (JSON): measures by name, what the cache is worth by length, the settings, the image.

    job: bundle, settings (over config.json's), prompt_tokens, answer_tokens, image_side (pixels), lengths, result.
    Peak memory is that of everything but the tower alone, which is loaded a second time for it.
    """
    bundle = Path(job["bundle"])
    base = resident_mb("VmRSS")
    started = CLOCK()
    engine = Engine(bundle, settings=job["settings"])
    measures = {"load_s": CLOCK() - started}
    clocked = Clocked(engine)
    request = job["prompt_tokens"] + job["answer_tokens"]
    ids = plain_tokens(engine, max([request, *(length + 1 for length in job["lengths"])]))
    measures |= text_measures(clocked, ids[:request], job["prompt_tokens"])
    cache = [clocked.cache_worth(ids[: length + 1]) for length in job["lengths"]]
    image, seeing = None, engine.family.sees
    if seeing:
        image = engine.family.image_size(job["image_side"], job["image_side"], engine.model)
        measures["image_s"] = image_seconds(engine, *image)
    peak = resident_mb("VmHWM")
    if seeing:
        measures["vision_s"] = tower_seconds(engine, *image)
    if peak is not None:
        measures |= {"base_mb": base, "peak_mb": peak, "bundle_mb": peak - base}
    config = json.loads((engine.folder / "config.json").read_text())
    result = {
        "measures": measures,
        "cache": cache,
        "engine": {"decoder": engine_settings(config), "vision": vision_settings(config)},
        "image": image,
    }
    Path(job["result"]).write_text(json.dumps(result))
