"""Run the evaluation set through the exported graphs in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf2mnn.evaluate.answers import Answer, Outcome
from hf2mnn.feeding import ways_of_feeding
from hf2mnn.onnx.session import OnnxModel
from hf2mnn.progress import steps
from hf2mnn.reference.golden import Golden, GoldenProbe


def _parity(model: OnnxModel, golden: Golden, probe: GoldenProbe) -> dict[str, np.ndarray]:
    read, ids = probe.after_pictures(model.facts.get("image_token_id"))
    pictures = [golden.picture(name) for name in probe.pictures]
    cache = model.new_cache()

    def start() -> None:
        cache.truncate(0)
        if read:
            model.prefill(cache, np.array(read), [(picture.pixel_values, picture.grid_thw) for picture in pictures])

    return ways_of_feeding(
        ids,
        start,
        lambda tokens: model.prefill(cache, np.array(tokens), all_logits=True),
        lambda count: cache.truncate(len(cache) - count),
    )


def run_onnxruntime(onnx_folder: Path, golden: Golden, max_new_tokens: int, threads: int) -> Outcome:
    """Teacher-forced logits by cached decode, token by token, then the greedy answer from the same prefill."""
    model, outcome = OnnxModel(onnx_folder, threads), Outcome()
    pictures = {name: golden.picture(name) for name in golden.picture_names()}
    for name, picture in steps("ONNX Runtime sees", pictures.items(), "pictures"):
        outcome.embeds[name] = model.family.as_rows(model.see((picture.pixel_values, picture.grid_thw)))
    for example in steps("ONNX Runtime answers", golden.examples(), "examples", len(golden.records)):
        cache = model.new_cache()
        fed = [(pictures[name].pixel_values, pictures[name].grid_thw) for name in example.pictures]
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
