"""KV cache of the ONNX Runtime session: appending and truncating in any order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.onnx.session import KVCache

LAYERS, HEADS, SIZE = 2, 3, 4


def presents(tokens: list[int]) -> np.ndarray:
    """Return presents whose values are the numbers of their tokens."""
    row = np.array(tokens, np.float32)[None, None, None, :, None, None]
    return np.broadcast_to(row, (LAYERS, 2, 1, len(tokens), HEADS, SIZE)).copy()


appends = st.tuples(st.just("append"), st.integers(1, 9))
truncations = st.tuples(st.just("keep"), st.floats(0, 1))


@given(st.lists(appends | truncations))
@settings(max_examples=50, deadline=None)
def test_the_cache_holds_the_tokens_that_were_not_truncated(steps: list[tuple[str, float]]) -> None:
    """Keys, values and positions stay together."""
    cache, tokens, positions, number = KVCache(LAYERS, HEADS, SIZE, 3), [], [], 0
    for step, amount in steps:
        if step == "append":
            new = list(range(number, number + int(amount)))
            number += len(new)
            # As for an image: rows that differ, and a largest position that is not the last.
            added = np.array([[7 * token % 11, token, 5] for token in new]).T
            tokens, positions = tokens + new, [*positions, *added.T.tolist()]
            cache.append(presents(tokens), added)
        else:
            length = round(amount * len(tokens))
            tokens, positions = tokens[:length], positions[:length]
            cache.truncate(length)
        assert len(cache) == len(tokens)
        assert cache.past.shape == (LAYERS, 2, 1, len(tokens), HEADS, SIZE)
        np.testing.assert_array_equal(cache.past, presents(tokens))
        assert cache.positions.T.tolist() == positions
        assert cache.next_position == max((max(row) for row in positions), default=-1) + 1


@given(length=st.integers(0, 5), wrong=st.integers(-9, 9))
@settings(max_examples=30, deadline=None)
def test_misuse_is_refused_and_changes_nothing(length: int, wrong: int) -> None:
    """Presents of another call and an invalid length raise; a silent slice would shift every position."""
    cache = KVCache(LAYERS, HEADS, SIZE, 3)
    cache.append(presents(list(range(length))), np.zeros((3, length), np.int64))
    if not 0 <= wrong <= length:
        with pytest.raises(ValueError, match=f"keep {wrong} of {length}"):
            cache.truncate(wrong)
    if wrong > 0 and wrong != length + 2:
        with pytest.raises(ValueError, match=f"do not follow {length} with 2 more"):
            cache.append(presents(list(range(wrong))), np.zeros((3, 2), np.int64))
    assert len(cache) == length
    assert cache.positions.shape == (3, length)
