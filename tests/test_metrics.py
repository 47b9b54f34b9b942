"""Distances between predictions, compared with torch and with their mathematical properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf2mnn.metrics import (
    common_prefix,
    cosine,
    ends_in_a_loop,
    kl_divergence,
    log_softmax,
    relative_error,
    repetition,
    same_top,
    token_logprobs,
    top_overlap,
)

shapes = st.tuples(st.integers(1, 5), st.integers(2, 40))


@st.composite
def pairs(draw: st.DrawFn, bound: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32 tables of logits of equal shape."""
    values = st.floats(-bound, bound, width=32)
    shape = draw(shapes)
    return tuple(draw(hnp.arrays(np.float32, shape, elements=values)) for _ in range(2))


@given(pairs())
@settings(max_examples=40, deadline=None)
def test_divergence_equals_that_of_torch(logits: tuple[np.ndarray, np.ndarray]) -> None:
    """KL(PyTorch || ours) is not symmetric: the reference distribution comes first."""
    reference, other = (torch.log_softmax(torch.from_numpy(table).double(), -1) for table in logits)
    theirs = torch.nn.functional.kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergence(*logits), theirs.numpy(), rtol=1e-9, atol=1e-12)


def test_divergence_of_a_known_case() -> None:
    """P = (3/4, 1/4), q = (1/4, 3/4): 3/4 ln 3 - 1/4 ln 3 nats, not bits; the divergence is not symmetric."""
    p, q = np.log(np.array([[3.0, 1.0]], np.float32)), np.log(np.array([[1.0, 3.0]], np.float32))
    np.testing.assert_allclose(kl_divergence(p, q), [0.5 * np.log(3)], rtol=1e-6)
    sharp, flat = np.array([[8.0, 0.0]], np.float32), np.zeros((1, 2), np.float32)
    assert kl_divergence(flat, sharp)[0] > 4 * kl_divergence(sharp, flat)[0]


@given(pairs(), st.floats(-1000, 1000))
@settings(max_examples=30, deadline=None)
def test_divergence_is_non_negative_and_shift_invariant(logits: tuple[np.ndarray, np.ndarray], shift: float) -> None:
    """It is 0 for equal logits, and a constant added to all logits of a row does not change it."""
    reference, other = logits
    assert (kl_divergence(reference, other) >= 0).all()
    assert (kl_divergence(reference, reference) == 0).all()
    moved = other.astype(np.float64) + shift
    np.testing.assert_allclose(kl_divergence(reference, moved), kl_divergence(reference, other), rtol=1e-6, atol=1e-9)


def test_logits_as_large_as_a_mask_do_not_overflow() -> None:
    """The logits of a broken bundle get a figure, not NaN, which would pass every gate."""
    broken = np.array([[-3.4e38, 0.0, 5.0], [3.4e38, 0.0, -3.4e38]], np.float32)
    sound = np.array([[1.0, 0.0, 5.0], [0.0, 9.0, 0.0]], np.float32)
    assert not np.isnan(kl_divergence(sound, broken)).any()
    assert (kl_divergence(sound, broken) > [0.01, 1e30]).all()
    np.testing.assert_allclose(np.exp(log_softmax(broken)).sum(-1), 1)


@given(pairs())
@settings(max_examples=30, deadline=None)
def test_same_top_means_equal_greedy_tokens(logits: tuple[np.ndarray, np.ndarray]) -> None:
    reference, other = logits
    # argmax of equal logits is the first in numpy as in the greedy loops that choose tokens.
    expected = [list(row).index(max(row)) == list(twin).index(max(twin)) for row, twin in zip(*logits, strict=True)]
    assert same_top(reference, other).tolist() == expected
    assert same_top(reference, reference).all()


@given(pairs())
@settings(max_examples=30, deadline=None)
def test_cosine_equals_that_of_torch(tables: tuple[np.ndarray, np.ndarray]) -> None:
    norms = [np.linalg.norm(table.astype(np.float64), axis=-1) for table in tables]
    assume(min(norm.min() for norm in norms) > 1e-3)  # torch clamps short vectors; those have a test of their own
    theirs = torch.nn.functional.cosine_similarity(*(torch.from_numpy(table).double() for table in tables), dim=-1)
    np.testing.assert_allclose(cosine(*tables), theirs.numpy(), rtol=1e-9, atol=1e-9)


def test_cosine_with_a_zero_embedding_is_zero() -> None:
    """A vision tower with all-zero output must not pass."""
    table = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
    assert cosine(table, np.zeros_like(table)).tolist() == [0.0, 0.0]
    assert cosine(table, -table)[0] == pytest.approx(-1)


def test_overlap_of_a_known_case() -> None:
    """{0, 1, 2} and {2, 1, 4} have two common tokens; their order and other tokens do not matter."""
    reference = np.array([[9.0, 8.0, 7.0, 1.0, 0.0]], np.float32)
    other = np.array([[0.0, 8.0, 9.0, 1.0, 7.0]], np.float32)
    assert top_overlap(reference, other, count=3) == pytest.approx(2 / 3)
    assert top_overlap(reference, other, count=1) == 0
    assert top_overlap(reference, other, count=50) == 1


@given(pairs(), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_overlap_is_a_share_and_symmetric(tables: tuple[np.ndarray, np.ndarray], count: int) -> None:
    reference, other = tables
    overlap = top_overlap(reference, other, count)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    assert (top_overlap(reference, reference, count) == 1).all()
    np.testing.assert_array_equal(overlap, top_overlap(other, reference, count))


def test_log_probability_of_a_known_case() -> None:
    """With weights 1, 2 and 5, the second token has probability 2/8, and the third 5/8."""
    logits = np.log(np.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]], np.float32))
    np.testing.assert_allclose(token_logprobs(logits, np.array([1, 2])), np.log([2 / 8, 5 / 8]), rtol=1e-6)


@given(pairs(), st.data())
@settings(max_examples=30, deadline=None)
def test_log_probabilities_equal_torch_cross_entropy(
    logits: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    table, _ = logits
    tokens = np.array([data.draw(st.integers(0, table.shape[1] - 1)) for _ in table])
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(table).double(), torch.from_numpy(tokens), reduction="none"
    )
    np.testing.assert_allclose(token_logprobs(table, tokens), -theirs.numpy(), rtol=1e-9, atol=1e-12)


def test_relative_error_of_known_cases() -> None:
    """A distance of 5 from a vector of norm 10; the error is infinite for a zero reference only."""
    right = np.array([[6.0, 8.0]], np.float32)
    assert relative_error(right, np.array([[9.0, 12.0]], np.float32)) == pytest.approx(0.5)
    assert relative_error(right, np.zeros_like(right)) == pytest.approx(1)
    assert relative_error(np.zeros_like(right), right) == np.inf
    assert relative_error(np.zeros_like(right), np.zeros_like(right)) == 0


@given(hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-100, 100, width=32)), st.floats(0.01, 10))
@settings(max_examples=30, deadline=None)
def test_relative_error_is_scale_invariant(values: np.ndarray, scale: float) -> None:
    """A vector scaled by s has an error of |s - 1|, whatever its norm is."""
    assume(np.linalg.norm(values) > 1e-3)
    values = values.astype(np.float64)
    assert relative_error(values, values * scale) == pytest.approx(abs(scale - 1), abs=1e-9)
    assert relative_error(values * 1e6, values * 1e6 * scale) == pytest.approx(abs(scale - 1), abs=1e-9)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([5], [6], 0)],
)
def test_common_prefix_ends_at_the_first_difference(one: list[int], other: list[int], shared: int) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == shared


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_is_the_longest_one(one: list[int], other: list[int]) -> None:
    shared = common_prefix(one, other)
    assert one[:shared] == other[:shared]
    assert shared in (len(one), len(other)) or one[shared] != other[shared]


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([7, 7, 7], 0),  # no 4-gram at all
        ([1, 2, 3, 4, 5], 0),
        ([7] * 6, 2 / 3),  # 3 of them, all the same
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 3, 9, 1, 2, 3], 0),  # 3-grams come again, 4-grams do not
    ],
)
def test_repetition_is_seq_rep_4(tokens: list[int], share: float) -> None:
    """Welleck et al.: 1 - distinct n-grams / n-grams."""
    assert repetition(tokens) == pytest.approx(share)


def test_repetition_counts_n_grams_of_the_given_length() -> None:
    assert repetition([1, 2, 1, 2, 1], n=2) == pytest.approx(1 / 2)
    assert repetition([1, 2, 1, 2, 1], n=1) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([], False),
        ([3] * 12, True),
        ([3] * 11, False),  # "aaaa" and the like end many a good answer
        ([1, 2, 3, *[8, 9] * 6], True),
        ([1, 2, 3, *[8, 9] * 5], False),
        ([*[8, 9] * 6, 1], False),  # it got out
        ([1, 2, 3, 4] * 4, True),
        ([1, 2, 3, 4] * 3, False),  # three times is a refrain
        ([9, *[1, 2, 3, 4, 5] * 4], True),
        ([4, 5, *[1, 2, 3, 4, 5] * 4, 1, 2], True),  # cut off in the middle of a piece
        ([5, 6, 7, 8] * 3 + [5, 6, 9, 8], False),
    ],
)
def test_loop_at_the_end_differs_from_repetition(tokens: list[int], looping: bool) -> None:
    assert ends_in_a_loop(tokens) is looping


@given(
    st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(12, 20)
)
def test_twelve_equal_tokens_at_the_end_are_a_loop(start: list[int], piece: list[int], times: int) -> None:
    assert ends_in_a_loop(start + piece * times)
    assert not ends_in_a_loop(start + piece * times + [10])


@given(st.permutations(range(30)))
def test_distinct_tokens_neither_repeat_nor_loop(tokens: list[int]) -> None:
    assert repetition(tokens) == 0
    assert not ends_in_a_loop(tokens)
