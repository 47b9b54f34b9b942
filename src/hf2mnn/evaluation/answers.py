"""What a runtime made of the evaluation set, in one form whichever runtime it was."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One example's outcome.

    logits: float32 [m, vocabulary], teacher-forced: row i follows the prompt and the reference's answer up to i.
    greedy_ids: the runtime's own greedy answer, decoded with its KV cache, the stop id included.
    written: the prompt that the engine makes of the conversation; as_called_ids: its answer to that, which a caller of
    the engine as it is gets; prompt_ids: what its tokenizer makes of the right prompt. All are None where the runtime
    has no such thing.
    """

    logits: np.ndarray
    greedy_ids: list[int]
    as_called_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    written: str | None = None


@dataclass
class Outcome:
    """Answers by example id, image embeddings float32 [image tokens, hidden] by image, and for each probe the logits
    float32 [tokens, vocabulary] by the way in which its tokens went into the KV cache.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    embeds: dict[str, np.ndarray] = field(default_factory=dict)
    parity: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
