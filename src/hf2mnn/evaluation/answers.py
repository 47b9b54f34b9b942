"""Outputs of a runtime on the evaluation set, in one form for all runtimes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Answer:
    """Outputs for one example.

    Attributes:
        logits: float32 [m, vocabulary], teacher-forced: row i follows the prompt and i tokens of PyTorch's answer.
        greedy_ids: Greedy answer, decoded with the runtime's KV cache, with the stop token.
        as_called_ids: Answer of a plain call of the engine; None for other runtimes.
        prompt_ids: Token ids of the reference prompt by the engine's tokenizer; None for other runtimes.
        rendered_prompt: Prompt that the engine renders from the conversation; None for other runtimes.
    """

    logits: np.ndarray
    greedy_ids: list[int]
    as_called_ids: list[int] | None = None
    prompt_ids: list[int] | None = None
    rendered_prompt: str | None = None


@dataclass
class Outputs:
    """Outputs for the evaluation set.

    Attributes:
        answers: Answers by example id.
        embeds: Image embeddings, float32 [image tokens, hidden], by image.
        parity: Logits, float32 [tokens, vocabulary], by probe and way of filling the KV cache.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    embeds: dict[str, np.ndarray] = field(default_factory=dict)
    parity: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
