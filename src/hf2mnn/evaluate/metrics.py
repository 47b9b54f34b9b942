"""Distances between two models' predictions, as the field defines them, from logits [positions, vocabulary]."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities; the largest logit is taken off first, so nothing overflows."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats at each position: sum over tokens of p * (log p - log q)."""
    p, q = log_softmax(reference), log_softmax(other)
    # Rounding can leave a tiny negative number where the two are equal; a divergence has none.
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def same_top(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether both would choose the same token at each position."""
    return reference.argmax(axis=-1) == other.argmax(axis=-1)


def cosine(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows; 0 where one of the two is all zero."""
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(other, axis=-1)
    dots = (reference * other).sum(axis=-1)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
