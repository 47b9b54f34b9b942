"""All ways of filling a KV cache give the same logits, and each fault of a cache changes some of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.evaluation.findings import wrong_cache
from hf2mnn.evaluation.score import parity_table
from hf2mnn.reference.cache_fill import CHUNK, SINGLE_CALL, logits_by_fill

WAYS = ["token by token", "in chunks", "multi-turn"]
VOCABULARY = 11
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]


class Model:
    """A model whose logits depend on every token and position up to the last, and on no other."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.tokens, self.positions = random.normal(size=(2, 64, VOCABULARY))
        self.cache: list[tuple[int, int]] = []

    def start(self) -> None:
        self.cache = [(0, 0), (10, 1)]  # a prefix, such as an image

    def rows(self, held: list[tuple[int, int]]) -> np.ndarray:
        return sum(self.tokens[token] * self.positions[position] for token, position in held)

    def feed(self, tokens: list[int]) -> np.ndarray:
        rows = []
        for token in tokens:
            self.cache.append((token, len(self.cache)))
            rows.append(self.rows(self.cache))
        return np.array(rows, np.float32)

    def truncate(self, count: int) -> None:
        del self.cache[len(self.cache) - count :]


class TruncatesNothing(Model):
    """Truncation removes nothing."""

    def truncate(self, count: int) -> None:
        pass


class TruncatesOneLess(Model):
    def truncate(self, count: int) -> None:
        super().truncate(count - 1)


class DropsHistory(Model):
    """Each call attends to its own tokens only, as an attention without KV cache."""

    def feed(self, tokens: list[int]) -> np.ndarray:
        before, self.cache = self.cache, []
        rows = []
        for position, token in enumerate(tokens, len(before)):
            self.cache.append((token, position))
            rows.append(self.rows(self.cache))
        self.cache = before + self.cache
        return np.array(rows, np.float32)


class SkipsOnePosition(Model):
    """Decoding starts one position too late."""

    def feed(self, tokens: list[int]) -> np.ndarray:
        if len(tokens) > 1:
            return super().feed(tokens)
        self.cache.append((tokens[0], len(self.cache) + 1))
        return self.rows(self.cache)[None].astype(np.float32)


class AttendsAhead(Model):
    """Every token attends to its whole call, as without causal mask."""

    def feed(self, tokens: list[int]) -> np.ndarray:
        rows = super().feed(tokens)
        return np.repeat(rows[-1:], len(rows), axis=0)


def ways(model: Model, ids: list[int] = IDS) -> dict[str, np.ndarray]:
    return logits_by_fill(ids, model.start, model.feed, model.truncate)


def changed(model: Model) -> list[str]:
    """Return the ways whose logits differ from those of a single call."""
    table = parity_table({"text": ways(model)})
    assert table["way"].tolist() == WAYS
    assert table["positions"].tolist() == [len(IDS)] * 3
    return table[table["max_kld"] > 1e-6]["way"].tolist()


@given(st.lists(st.integers(0, 60), min_size=2, max_size=30))
@settings(max_examples=20, deadline=None)
def test_a_right_cache_gives_the_same_logits_in_all_ways(ids: list[int]) -> None:
    """Texts may be shorter than a chunk and than the truncated answer."""
    fed = ways(Model(), ids)
    assert list(fed) == [SINGLE_CALL, *WAYS]
    for rows in fed.values():
        np.testing.assert_array_equal(rows, fed[SINGLE_CALL])
    assert fed[SINGLE_CALL].shape == (len(ids), VOCABULARY)


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        (Model, []),
        (TruncatesNothing, ["multi-turn"]),
        (TruncatesOneLess, ["multi-turn"]),
        (DropsHistory, WAYS),
        (SkipsOnePosition, ["token by token"]),
        (AttendsAhead, WAYS),
    ],
)
def test_each_fault_changes_the_expected_ways(broken: type[Model], wrong: list[str]) -> None:
    assert changed(broken()) == wrong
    findings = wrong_cache(parity_table({"text": ways(broken())}))
    assert len(findings) == (1 if wrong else 0)
    for finding in findings:
        assert finding.part == "cache"
        assert all(f"{way} (text)" in finding.message for way in wrong)
        assert not any(way in finding.message for way in set(WAYS) - set(wrong))


def test_a_fault_between_chunks_shows_after_the_first_chunk() -> None:
    """The first chunk is right, so a probe must be longer than one."""
    fed = ways(DropsHistory())
    np.testing.assert_array_equal(fed["in chunks"][0], fed[SINGLE_CALL][0])
    assert (fed["in chunks"][CHUNK:] != fed[SINGLE_CALL][CHUNK:]).any(axis=1).all()
