"""Engine task: the logits of a bundle after single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.mnn.worker.session import ModelSession


def run(job: dict[str, Any]) -> None:
    """Write float32 [tokens, vocabulary] to job["result"] (npy): a row after each of job["tokens"] alone."""
    session, rows = ModelSession(Path(job["bundle"])), []
    for token in job["tokens"]:
        session.llm.reset()
        rows.append(session.logits([token]))
    np.save(job["result"], np.stack(rows))
