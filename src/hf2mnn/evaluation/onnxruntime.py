"""Outputs of the exported graphs in ONNX Runtime on the evaluation set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf2mnn.core.progress import steps
from hf2mnn.evaluation.score import Answer, Outputs
from hf2mnn.onnx.session import Image, OnnxModel
from hf2mnn.reference.cache_fill import logits_by_fill
from hf2mnn.reference.golden import Golden, GoldenProbe


def _cache_logits(model: OnnxModel, probe: GoldenProbe, images: list[Image]) -> dict[str, np.ndarray]:
    """Return the logits of a probe's text after its images for each way of filling the KV cache."""
    prefix, ids = probe.split_after_images(model.info.get("image_token_id"))
    cache = model.new_cache()

    def start() -> None:
        cache.truncate(0)
        if prefix:
            model.prefill(cache, np.array(prefix), images)

    return logits_by_fill(
        ids,
        start,
        lambda tokens: model.prefill(cache, np.array(tokens), all_logits=True),
        lambda count: cache.truncate(len(cache) - count),
    )


def run_onnxruntime(onnx_folder: Path, golden: Golden, max_new_tokens: int, threads: int) -> Outputs:
    """Run the evaluation set: teacher-forced logits token by token, and greedy answers from the same prefill."""
    model, outputs, images = OnnxModel(onnx_folder, threads), Outputs(), {}
    for name in steps("ONNX Runtime: image embeddings", golden.image_names(), "images"):
        image = golden.image(name)
        images[name] = (image.pixel_values, image.grid_thw)
        outputs.embeds[name] = model.family.concat_outputs(model.embed_image(images[name]))
    for example in steps("ONNX Runtime: answers", golden.examples(), "examples", len(golden.records)):
        cache = model.new_cache()
        first = model.prefill(cache, example.input_ids, [images[name] for name in example.images])
        forced = [example.answer_ids[i : i + 1] for i in range(len(example.answer_ids) - 1)]
        logits = [first, *(model.prefill(cache, token) for token in forced)]
        cache.truncate(len(example.input_ids))
        greedy = model.greedy(cache, first[-1], max_new_tokens)
        outputs.answers[example.id] = Answer(np.concatenate(logits), greedy)
    for probe in golden.probes():
        outputs.parity[probe.kind] = _cache_logits(model, probe, [images[name] for name in probe.images])
    return outputs
