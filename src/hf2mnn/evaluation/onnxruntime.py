"""Run the evaluation set through the exported graphs in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf2mnn.core.progress import steps
from hf2mnn.evaluation.answers import Answer, Outcome
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.reference.cache_fill import ways_of_feeding
from hf2mnn.reference.golden import Golden, GoldenProbe


def _parity(model: OnnxModel, golden: Golden, probe: GoldenProbe) -> dict[str, np.ndarray]:
    read, ids = probe.after_images(model.facts.get("image_token_id"))
    images = [golden.image(name) for name in probe.images]
    cache = model.new_cache()

    def start() -> None:
        cache.truncate(0)
        if read:
            model.prefill(cache, np.array(read), [(image.pixel_values, image.grid_thw) for image in images])

    return ways_of_feeding(
        ids,
        start,
        lambda tokens: model.prefill(cache, np.array(tokens), all_logits=True),
        lambda count: cache.truncate(len(cache) - count),
    )


def run_onnxruntime(onnx_folder: Path, golden: Golden, max_new_tokens: int, threads: int) -> Outcome:
    """Teacher-forced logits by cached decode, token by token, then the greedy answer from the same prefill."""
    model, outcome = OnnxModel(onnx_folder, threads), Outcome()
    images = {name: golden.image(name) for name in golden.image_names()}
    for name, image in steps("ONNX Runtime sees", images.items(), "images"):
        outcome.embeds[name] = model.family.as_rows(model.see((image.pixel_values, image.grid_thw)))
    for example in steps("ONNX Runtime answers", golden.examples(), "examples", len(golden.records)):
        cache = model.new_cache()
        fed = [(images[name].pixel_values, images[name].grid_thw) for name in example.images]
        first = model.prefill(cache, example.input_ids, fed)
        rows = [first] + [
            model.prefill(cache, example.answer_ids[i : i + 1]) for i in range(len(example.answer_ids) - 1)
        ]
        cache.truncate(len(example.input_ids))
        greedy = model.greedy(cache, first[-1], max_new_tokens)
        outcome.answers[example.id] = Answer(np.concatenate(rows), greedy)
    for probe in golden.probes():
        outcome.parity[probe.kind] = _parity(model, golden, probe)
    return outcome
