"""Ways of filling a KV cache with a text, all of which must give the same logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SINGLE_CALL = "at once"
CHUNK = 7
"""Tokens of a chunk: not a multiple of any tile size of the engine's kernels."""
ROLLED_BACK = 3
"""Tokens that the multi-turn way appends and removes again."""

Feed = Callable[[list[int]], np.ndarray]
"""Function from token ids, appended to the cache, to their logits [tokens, vocabulary]."""


def logits_by_fill(ids: list[int], start: Callable[[], None], feed: Feed, truncate: Callable[[int], None]) -> dict:
    """Return the logits [tokens, vocabulary] of a text for each way of filling the cache.

    Args:
        ids: Token ids of the text.
        start: Resets the cache to its state before the text.
        feed: Appends tokens to the cache and returns their logits.
        truncate: Removes the last n tokens from the cache.
    """

    def chunks(size: int) -> np.ndarray:
        start()
        return np.concatenate([feed(ids[i : i + size]) for i in range(0, len(ids), size)])

    def multi_turn() -> np.ndarray:
        """Feed a first turn, decode an answer and remove it, then feed the second turn."""
        start()
        half = len(ids) // 2
        first = feed(ids[:half])
        answer = ids[:ROLLED_BACK]
        for token in answer:
            feed([token])
        truncate(len(answer))
        return np.concatenate([first, feed(ids[half:])])

    return {
        SINGLE_CALL: chunks(len(ids)),
        "token by token": chunks(1),
        "in chunks": chunks(CHUNK),
        "multi-turn": multi_turn(),
    }
