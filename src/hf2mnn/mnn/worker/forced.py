"""Teacher-forced logits of some examples, and their prompts by the bundle's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf2mnn.core.progress import steps
from hf2mnn.mnn.worker.session import ModelSession, engine_image
from hf2mnn.reference.golden import Golden


def run(job: dict[str, Any]) -> None:
    """Write the logits of job["examples"] (ids) and the ids of their prompts.

    job["settings"] replace settings of the bundle. With job["resize"] the engine resizes the original images to the
    sizes that the checkpoint's processor chooses.

    job["result"] (safetensors) gets float32 [answer tokens, vocabulary] by example, job["tokens"] (JSON) token ids by
    example.
    """
    session = ModelSession(Path(job["bundle"]), job["threads"], job["settings"])
    golden, logits, prompts = Golden(Path(job["reference"])), {}, {}
    chosen = (example for example in golden.examples() if example.id in job["examples"])
    for example in steps("MNN forced answers", chosen, "examples", len(job["examples"])):
        images = []
        for name in example.images:
            image = golden.image(name)
            size = image.resized.shape[:2]
            images.append(engine_image(image.original if job["resize"] else image.resized, size))
        rows = [session.prefill(example.input_ids.tolist(), example.position_ids, images)]
        rows += [session.logits([token]) for token in example.answer_ids[:-1].tolist()]
        logits[example.id] = np.stack(rows)
        prompts[example.id] = [int(token) for token in session.llm.tokenizer_encode(example.prompt)]
    save_file(logits, job["result"])
    Path(job["tokens"]).write_text(json.dumps(prompts))
