"""Metrics of predictions, from logits [positions, vocabulary], and of answers and embeddings.

KL divergence, agreement of the top token, RMS of the change of the right token's probability, perplexity ratio and
correlation of log-probabilities are those that llama.cpp's perplexity tool reports for quantized models. seq-rep-n is
from Welleck et al., Neural Text Generation with Unlikelihood Training, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 log-probabilities; the largest logit is subtracted first, which prevents overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL(reference || other) in nats at each position: the sum over tokens of p * (log p - log q)."""
    p, q = log_softmax(reference), log_softmax(other)
    # Rounding can give a tiny negative number for equal predictions; a divergence is not negative.
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def same_top(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each position whether both models choose the same token."""
    return reference.argmax(axis=-1) == other.argmax(axis=-1)


def top_overlap(reference: np.ndarray, other: np.ndarray, count: int = 5) -> np.ndarray:
    """Return the common share of the `count` most likely tokens at each position."""
    count = min(count, reference.shape[-1])
    tops = [np.argpartition(-logits, count - 1, axis=-1)[:, :count] for logits in (reference, other)]
    return (tops[0][:, :, None] == tops[1][:, None, :]).any(axis=-1).mean(axis=-1)


def token_logprobs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probability in nats of `tokens` (int, [positions]) at each position."""
    return np.take_along_axis(log_softmax(logits), np.asarray(tokens)[:, None], axis=-1)[:, 0]


def cosine(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows; 0 if one row is all zero."""
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.divide((reference * other).sum(axis=-1), norms, out=np.zeros_like(norms), where=norms > 0)


def relative_error(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the L2 norm of the difference divided by that of `reference`.

    It is infinite if only `reference` is all zero, or if `other` is not finite, because NaN would pass every bound.
    """
    if not np.isfinite(other).all():
        return float("inf")
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    difference, size = np.linalg.norm(reference - other), np.linalg.norm(reference)
    return float(difference / size) if size else float(np.inf if difference else 0.0)


def common_prefix(one: Sequence, other: Sequence) -> int:
    """Return the length of the common prefix of two token lists or texts."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Return seq-rep-n: the share of n-grams that repeat an earlier one; 0 without n-grams."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_a_loop(tokens: Sequence[int], times: int = 4, shortest: int = 12) -> bool:
    """Return whether an answer ends in a loop: a piece `times` times or more, of at least `shortest` tokens in all."""
    for period in range(1, len(tokens) // times + 1):
        length = max(times * period, shortest)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False
