"""The ways in which a text comes into a KV cache; each must give the same logits at every position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

AT_ONCE = "at once"
CHUNK = 7
"""Tokens of a chunk: no multiple of any tile of the engine's kernels."""
ASTRAY = 3
"""Tokens that the second turn takes back before it goes on."""

Feed = Callable[[list[int]], np.ndarray]
"""Tokens after those in the cache to their logits [tokens, vocabulary]."""


def ways_of_feeding(ids: list[int], start: Callable[[], None], feed: Feed, forget: Callable[[int], None]) -> dict:
    """Logits [tokens, vocabulary] of `ids` by the way they came in. `start` makes the cache as it was before them;
    `forget(n)` takes the last n tokens out of it.
    """

    def chunks(size: int) -> np.ndarray:
        start()
        return np.concatenate([feed(ids[i : i + size]) for i in range(0, len(ids), size)])

    def two_turns() -> np.ndarray:
        """A first turn, an answer that is taken back, and a second turn after what is left."""
        start()
        half = len(ids) // 2
        first = feed(ids[:half])
        for token in ids[:ASTRAY]:
            feed([token])
        forget(len(ids[:ASTRAY]))
        return np.concatenate([first, feed(ids[half:])])

    return {
        AT_ONCE: chunks(len(ids)),
        "token by token": chunks(1),
        "in chunks": chunks(CHUNK),
        "two turns": two_turns(),
    }
