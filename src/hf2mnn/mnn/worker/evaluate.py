"""Everything that the comparison wants to know of one bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from hf2mnn.mnn.worker.session import Engine, tag_pictures
from hf2mnn.mnn.worker.vision import vision_embeds
from hf2mnn.reference.golden import Golden


def run(job: dict[str, Any]) -> None:
    """Everything about one bundle into job["result"] (safetensors) and job["called"] (JSON, ids by example)."""
    bundle, golden, limit = Path(job["bundle"]), Golden(Path(job["reference"])), job["max_new_tokens"]
    engine = Engine(bundle, job["threads"])
    tensors, called = {}, {}
    for example in tqdm(golden.examples(), desc="MNN", total=len(golden.records), unit="example", mininterval=5):
        pictures = [golden.picture(name) for name in example.pictures]
        rows, greedy = engine.judge(example, [picture.resized for picture in pictures], limit)
        tensors[f"examples/{example.id}/logits"] = rows
        tensors[f"examples/{example.id}/greedy_ids"] = np.array(greedy, np.int64)
        prompt = tag_pictures(example.prompt, engine.family.image_text)
        called[example.id] = engine.as_called(prompt, [picture.original for picture in pictures], limit)
    for name, embeds in vision_embeds(bundle, engine, golden, job["threads"]):
        tensors[f"pictures/{name}/embeds"] = embeds
    save_file(tensors, job["result"])
    Path(job["called"]).write_text(json.dumps(called))
