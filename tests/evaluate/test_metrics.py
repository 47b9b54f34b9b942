"""The distances, against torch and against their own laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf2mnn.evaluate.metrics import cosine, kl_divergence, log_softmax, same_top

shapes = st.tuples(st.integers(1, 5), st.integers(2, 40))


@st.composite
def pairs(draw: st.DrawFn, bound: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 tables of logits of one shape."""
    values = st.floats(-bound, bound, width=32)
    shape = draw(shapes)
    return tuple(draw(hnp.arrays(np.float32, shape, elements=values)) for _ in range(2))


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_divergence_is_torchs(logits: tuple[np.ndarray, np.ndarray]) -> None:
    """The order matters: KL(PyTorch || ours), the distribution that is right comes first."""
    reference, other = (torch.log_softmax(torch.from_numpy(table).double(), -1) for table in logits)
    theirs = torch.nn.functional.kl_div(other, reference, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergence(*logits), theirs.numpy(), rtol=1e-9, atol=1e-12)


def test_divergence_of_a_case_worked_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): 3/4 ln 3 - 1/4 ln 3 nats, not bits; and a row is not its mirror image."""
    p, q = np.log(np.array([[3.0, 1.0]], np.float32)), np.log(np.array([[1.0, 3.0]], np.float32))
    np.testing.assert_allclose(kl_divergence(p, q), [0.5 * np.log(3)], rtol=1e-6)
    sharp, flat = np.array([[8.0, 0.0]], np.float32), np.zeros((1, 2), np.float32)
    assert kl_divergence(flat, sharp)[0] > 4 * kl_divergence(sharp, flat)[0]


@given(pairs(), st.floats(-1000, 1000))
@settings(max_examples=60, deadline=None)
def test_divergence_obeys_its_laws(logits: tuple[np.ndarray, np.ndarray], shift: float) -> None:
    """Never negative, nothing between equals, and blind to a number added to all logits of a row."""
    reference, other = logits
    assert (kl_divergence(reference, other) >= 0).all()
    assert (kl_divergence(reference, reference) == 0).all()
    moved = other.astype(np.float64) + shift
    np.testing.assert_allclose(kl_divergence(reference, moved), kl_divergence(reference, other), rtol=1e-6, atol=1e-9)


def test_logits_as_large_as_a_mask_do_not_overflow() -> None:
    """A broken bundle's logits still get a figure, not NaN that every gate lets pass."""
    broken = np.array([[-3.4e38, 0.0, 5.0], [3.4e38, 0.0, -3.4e38]], np.float32)
    sound = np.array([[1.0, 0.0, 5.0], [0.0, 9.0, 0.0]], np.float32)
    assert not np.isnan(kl_divergence(sound, broken)).any()
    assert (kl_divergence(sound, broken) > [0.01, 1e30]).all()
    np.testing.assert_allclose(np.exp(log_softmax(broken)).sum(-1), 1)


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_same_top_is_the_same_greedy_token(logits: tuple[np.ndarray, np.ndarray]) -> None:
    reference, other = logits
    # argmax of equal logits is the first in numpy as in the greedy loops that choose tokens.
    expected = [list(row).index(max(row)) == list(twin).index(max(twin)) for row, twin in zip(*logits, strict=True)]
    assert same_top(reference, other).tolist() == expected
    assert same_top(reference, reference).all()


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_cosine_is_torchs(tables: tuple[np.ndarray, np.ndarray]) -> None:
    norms = [np.linalg.norm(table.astype(np.float64), axis=-1) for table in tables]
    assume(min(norm.min() for norm in norms) > 1e-3)  # torch clamps short vectors; those have a test of their own
    theirs = torch.nn.functional.cosine_similarity(*(torch.from_numpy(table).double() for table in tables), dim=-1)
    np.testing.assert_allclose(cosine(*tables), theirs.numpy(), rtol=1e-9, atol=1e-9)


def test_an_empty_picture_is_not_a_perfect_one() -> None:
    """A vision tower that gives all zeros must not pass for one that agrees."""
    table = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
    assert cosine(table, np.zeros_like(table)).tolist() == [0.0, 0.0]
    assert cosine(table, -table)[0] == pytest.approx(-1)
