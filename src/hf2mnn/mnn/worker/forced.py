"""Teacher-forced logits of some examples, and what the bundle's tokenizer makes of their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf2mnn.core.progress import steps
from hf2mnn.mnn.worker.session import Engine, image_input
from hf2mnn.reference.golden import Golden


def run(job: dict[str, Any]) -> None:
    """For each of job["examples"] (ids) float32 [answer tokens, vocabulary] by id into job["result"] (safetensors), and
    token ids by id into job["tokens"] (JSON).

    job["settings"] go over the bundle's own. With job["resize"] the engine itself resizes the original images to the
    sizes that the checkpoint's processor chooses.
    """
    engine = Engine(Path(job["bundle"]), job["threads"], job["settings"])
    golden, wanted, prompts = Golden(Path(job["reference"])), {}, {}
    chosen = (example for example in golden.examples() if example.id in job["examples"])
    for example in steps("MNN reads", chosen, "examples", len(job["examples"])):
        images = []
        for name in example.images:
            image = golden.image(name)
            size = image.resized.shape[:2]
            images.append(image_input(image.original if job["resize"] else image.resized, size))
        rows = [engine.prefill(example.input_ids.tolist(), example.position_ids, images)]
        rows += [engine.logits([token]) for token in example.answer_ids[:-1].tolist()]
        wanted[example.id] = np.stack(rows)
        prompts[example.id] = [int(token) for token in engine.llm.tokenizer_encode(example.prompt)]
    save_file(wanted, job["result"])
    Path(job["tokens"]).write_text(json.dumps(prompts))
