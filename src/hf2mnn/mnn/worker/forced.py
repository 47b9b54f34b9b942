"""Teacher-forced logits of some examples, and their prompts by the bundle's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from hf2mnn.core.progress import steps
from hf2mnn.mnn.worker.session import ModelSession, engine_image
from hf2mnn.reference.golden import Golden


def run(job: dict[str, Any]) -> None:
    """Write logits, float32 [answer, vocabulary], and prompt ids by example to job["result"] and job["tokens"].

    job["settings"] replace settings of the bundle. With job["resize"] the engine resizes the original images to the
    sizes that the checkpoint's processor chooses.
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
        ids, answer = example.input_ids.tolist(), example.answer_ids.tolist()
        logits[example.id] = session.forced(ids, example.position_ids, images, answer)
        prompts[example.id] = [int(token) for token in session.llm.tokenizer_encode(example.prompt)]
    save_file(logits, job["result"])
    Path(job["tokens"]).write_text(json.dumps(prompts))
