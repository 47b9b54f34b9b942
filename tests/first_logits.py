"""A task for a child process with MNN's engine: what a bundle predicts after single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.worker.session import Engine


def run(job: dict[str, Any]) -> None:
    """float32 [tokens, vocabulary], a row after each of job["tokens"] alone, into job["result"] (npy)."""
    engine, rows = Engine(Path(job["bundle"])), []
    for token in job["tokens"]:
        engine.llm.reset()
        rows.append(engine.logits([token]))
    np.save(job["result"], np.stack(rows))
