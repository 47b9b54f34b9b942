"""What a runtime made of the evaluation set, in one form whichever runtime it was."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SUMMARY, ANSWERS, POSITIONS, PICTURES, LOGITS = (
    "summary.json",
    "answers.parquet",
    "metrics.parquet",
    "pictures.parquet",
    "logits.safetensors",
)


@dataclass(frozen=True)
class Answer:
    """One example's outcome.

    logits: float32 [m, vocabulary], teacher-forced: row i follows the prompt and the reference's answer up to i.
    greedy_ids: the runtime's own greedy answer, decoded with its KV cache, the stop id included.
    as_called_ids: what a caller of the engine as it is gets; None where the runtime has no such difference.
    """

    logits: np.ndarray
    greedy_ids: list[int]
    as_called_ids: list[int] | None = None


@dataclass
class Outcome:
    """Answers by example id, and image embeddings float32 [image tokens, hidden] by picture."""

    answers: dict[str, Answer] = field(default_factory=dict)
    embeds: dict[str, np.ndarray] = field(default_factory=dict)
