"""However a text came into a cache, its logits are the same; and each way in which a cache can be wrong shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.evaluation.findings import wrong_cache
from hf2mnn.evaluation.parity import COLUMNS, parity_table
from hf2mnn.reference.cache_fill import AT_ONCE, CHUNK, ways_of_feeding

WAYS = ["token by token", "in chunks", "two turns"]
VOCABULARY = 11
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]


class Model:
    """A model whose logits after a token follow from every token and position up to it, and no other."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.tokens, self.positions = random.normal(size=(2, 64, VOCABULARY))
        self.cache: list[tuple[int, int]] = []

    def start(self) -> None:
        self.cache = [(0, 0), (10, 1)]  # what was read before: an image, say

    def rows(self, held: list[tuple[int, int]]) -> np.ndarray:
        return sum(self.tokens[token] * self.positions[position] for token, position in held)

    def feed(self, tokens: list[int]) -> np.ndarray:
        rows = []
        for token in tokens:
            self.cache.append((token, len(self.cache)))
            rows.append(self.rows(self.cache))
        return np.array(rows, np.float32)

    def forget(self, count: int) -> None:
        del self.cache[len(self.cache) - count :]


class KeepsAll(Model):
    """What is taken back stays."""

    def forget(self, count: int) -> None:
        pass


class ForgetsOneLess(Model):
    def forget(self, count: int) -> None:
        super().forget(count - 1)


class ForgetsHistory(Model):
    """Each call sees its own tokens only: an attention that was not fused."""

    def feed(self, tokens: list[int]) -> np.ndarray:
        before, self.cache = self.cache, []
        rows = []
        for place, token in enumerate(tokens, len(before)):
            self.cache.append((token, place))
            rows.append(self.rows(self.cache))
        self.cache = before + self.cache
        return np.array(rows, np.float32)


class CountsOneTooMany(Model):
    """Decoding begins one position late."""

    def feed(self, tokens: list[int]) -> np.ndarray:
        if len(tokens) > 1:
            return super().feed(tokens)
        self.cache.append((tokens[0], len(self.cache) + 1))
        return self.rows(self.cache)[None].astype(np.float32)


class SeesAhead(Model):
    """Every token of a call sees all of that call: no causal mask."""

    def feed(self, tokens: list[int]) -> np.ndarray:
        rows = super().feed(tokens)
        return np.repeat(rows[-1:], len(rows), axis=0)


def ways(model: Model, ids: list[int] = IDS) -> dict[str, np.ndarray]:
    return ways_of_feeding(ids, model.start, model.feed, model.forget)


def changed(model: Model) -> list[str]:
    """The ways whose logits are not those of reading at once, by the table."""
    table = parity_table({"text": ways(model)})
    assert table["way"].tolist() == WAYS
    assert table["positions"].tolist() == [len(IDS)] * 3
    return table[table["max_kld"] > 1e-6]["way"].tolist()


@given(st.lists(st.integers(0, 60), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_sound_cache_gives_the_same_by_every_way(ids: list[int]) -> None:
    """Texts of any length, shorter than a chunk and than what goes astray as well."""
    fed = ways(Model(), ids)
    assert list(fed) == [AT_ONCE, *WAYS]
    for rows in fed.values():
        np.testing.assert_array_equal(rows, fed[AT_ONCE])
    assert fed[AT_ONCE].shape == (len(ids), VOCABULARY)


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        (Model, []),
        (KeepsAll, ["two turns"]),
        (ForgetsOneLess, ["two turns"]),
        (ForgetsHistory, WAYS),
        (CountsOneTooMany, ["token by token"]),
        (SeesAhead, WAYS),
    ],
)
def test_the_table_shows_what_is_wrong_with_a_cache(broken: type[Model], wrong: list[str]) -> None:
    assert changed(broken()) == wrong
    findings = wrong_cache(parity_table({"text": ways(broken())}))
    assert len(findings) == (1 if wrong else 0)
    for finding in findings:
        assert finding.part == "cache"
        assert all(f"{way} (text)" in finding.sentence for way in wrong)
        assert not any(way in finding.sentence for way in set(WAYS) - set(wrong))


def test_a_fault_at_the_borders_of_chunks_is_seen_behind_the_first() -> None:
    """The first chunk is right by itself; so the probe must be longer than one."""
    fed = ways(ForgetsHistory())
    np.testing.assert_array_equal(fed["in chunks"][0], fed[AT_ONCE][0])
    assert (fed["in chunks"][CHUNK:] != fed[AT_ONCE][CHUNK:]).any(axis=1).all()


def test_the_table_of_a_case_worked_by_hand() -> None:
    """Two positions, at one of which two of three logits are swapped."""
    right = np.log(np.array([[1, 1, 2], [4, 2, 2]], np.float32))
    other = np.log(np.array([[1, 1, 2], [2, 4, 2]], np.float32))
    ((probe, way, positions, kld, change, same),) = parity_table({"text": {AT_ONCE: right, "in chunks": other}}).values
    assert (probe, way, positions, same) == ("text", "in chunks", 2, 0.5)
    assert kld == pytest.approx((4 * np.log(2) - 2 * np.log(2)) / 8)
    assert change == pytest.approx(np.log(2) / right.std())


def test_no_probe_makes_an_empty_table() -> None:
    table = parity_table({})
    assert list(table.columns) == COLUMNS
    assert wrong_cache(table) == []
