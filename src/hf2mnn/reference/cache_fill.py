"""Ways of filling a KV cache with a text, all of which must give the same logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SINGLE_CALL = "at once"
CHUNK = 7  # tokens of a chunk: not a multiple of any tile size of the engine's kernels
ROLLED_BACK = 3  # tokens that the multi-turn way appends and removes again


def logits_by_fill(
    ids: list[int], start: Callable[[], None], feed: Callable[[list[int]], np.ndarray], truncate: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Return the logits [tokens, vocabulary] of a text for each way of filling the cache.

    `start` resets the cache to its state before the text, `feed` appends tokens and returns their logits, and
    `truncate` removes the last n tokens.
    """

    def chunks(size: int) -> np.ndarray:
        start()
        return np.concatenate([feed(ids[i : i + size]) for i in range(0, len(ids), size)])

    def multi_turn() -> np.ndarray:
        """Feed a first turn, decode an answer and remove it, then feed the second turn."""
        start()
        half, answer = len(ids) // 2, ids[:ROLLED_BACK]
        first = feed(ids[:half])
        for token in answer:
            feed([token])
        truncate(len(answer))
        return np.concatenate([first, feed(ids[half:])])

    sizes = {SINGLE_CALL: len(ids), "token by token": 1, "in chunks": CHUNK}
    return {name: chunks(size) for name, size in sizes.items()} | {"multi-turn": multi_turn()}
