"""From tables of positions, answers and images to figures with their uncertainty, for the whole set and for parts.

Intervals are 95 % percentile bootstraps over examples, not positions: those of one answer hang together (Efron and
Tibshirani, 1993, chapter 8.5 on resampling the units that are independent).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

COLUMNS = ["group", "figure", "value", "low", "high", "count"]
RESAMPLES, SEED = 500, 0
QUANTILES = {"median_kld": 0.5, "p90_kld": 0.9, "p95_kld": 0.95, "p99_kld": 0.99, "p999_kld": 0.999}

Weighted = Callable[[np.ndarray], np.ndarray]
"""From weights [resamples, rows] to one value a resample."""


def _mean(values: pd.Series) -> Weighted:
    column = values.to_numpy(np.float64)
    return lambda weights: weights @ column / weights.sum(axis=1)


def _quantile(values: pd.Series, share: float) -> Weighted:
    """The smallest value with at least `share` of the weight at or below it."""
    column = values.to_numpy(np.float64)
    order = np.argsort(column, kind="stable")

    def of(weights: np.ndarray) -> np.ndarray:
        below = np.cumsum(weights[:, order], axis=1)
        reached = below >= share * below[:, -1:] - 1e-9
        return column[order][reached.argmax(axis=1)]

    return of


def _correlation(one: pd.Series, other: pd.Series) -> Weighted:
    x, y = one.to_numpy(np.float64), other.to_numpy(np.float64)

    def of(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=1)
        mean_x, mean_y = weights @ x / total, weights @ y / total
        both = weights @ (x * y) / total - mean_x * mean_y
        spread = (weights @ x**2 / total - mean_x**2) * (weights @ y**2 / total - mean_y**2)
        return np.divide(both, np.sqrt(np.maximum(spread, 0)), out=np.full(len(both), np.nan), where=spread > 0)

    return of


def _position_figures(positions: pd.DataFrame) -> dict[str, Weighted]:
    change = np.exp(positions["logprob"]) - np.exp(positions["reference_logprob"])
    squared, lost = _mean(change**2), _mean(positions["reference_logprob"] - positions["logprob"])
    reference, other = _mean(-positions["reference_logprob"]), _mean(-positions["logprob"])
    return {
        "mean_kld": _mean(positions["kld"]),
        **{name: _quantile(positions["kld"], share) for name, share in QUANTILES.items()},
        "max_kld": _quantile(positions["kld"], 1.0),
        "rms_probability_change": lambda weights: np.sqrt(squared(weights)),
        "top1_agreement": _mean(positions["same_top"]),
        "top5_overlap": _mean(positions["top5_overlap"]),
        "reference_perplexity": lambda weights: np.exp(reference(weights)),
        "perplexity": lambda weights: np.exp(other(weights)),
        "perplexity_ratio": lambda weights: np.exp(lost(weights)),
        "logprob_correlation": _correlation(positions["reference_logprob"], positions["logprob"]),
    }


ANSWER_FIGURES = {
    "greedy_match": "greedy_match",
    "common_prefix": "prefix_share",
    "common_prefix_tokens": "prefix_tokens",
    "repetition": "repetition",
    "degenerate": "degenerate",
    "task_accuracy": "score",
    "reference_accuracy": "reference_score",
    "as_called_match": "as_called_match",
    "as_called_accuracy": "as_called_score",
    "tokenizer_match": "tokenizer_match",
    "template_match": "template_match",
}
"""Mean over examples of a column of the table of answers; an example without a value does not count."""


def _rows(group: str, figures: dict[str, Weighted], examples: pd.Series) -> list[tuple]:
    """`examples` says of which example each row of the table is."""
    codes, _ = pd.factorize(examples)
    count = codes.max() + 1
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    whole, resampled = np.ones((1, len(codes))), drawn[:, codes].astype(np.float64)
    rows = []
    for name, figure in figures.items():
        value = float(figure(whole)[0])
        low, high = np.nanquantile(figure(resampled), [0.025, 0.975]) if np.isfinite(value) else (np.nan, np.nan)
        rows.append((group, name, value, float(low), float(high), len(codes)))
    return rows


def _groups(positions: pd.DataFrame, answers: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """The whole set, text and what follows an image apart, and each category and language, where there are several."""
    imaged = answers["images"] > 0
    picked = {"all": pd.Series(True, index=answers.index), "text": ~imaged, "after an image": imaged}
    for column in ("category", "language"):
        values = sorted(answers[column].unique())
        picked |= {f"{column} {value}": answers[column] == value for value in values if len(values) > 1}
    groups = {}
    for name, chosen in picked.items():
        some = answers[chosen]
        if len(some):
            groups[name] = (positions[positions["id"].isin(some["id"])], some)
    return groups


def figures(positions: pd.DataFrame, answers: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """A table with COLUMNS: each figure of each group, its 95 % interval, and how many rows it was measured on."""
    rows = []
    for name, (some_positions, some_answers) in _groups(positions, answers).items():
        rows += _rows(name, _position_figures(some_positions), some_positions["id"])
        for figure, column in ANSWER_FIGURES.items():
            known = some_answers[some_answers[column].notna()]
            if len(known):
                rows += _rows(name, {figure: _mean(known[column].astype(float))}, known["id"])
    if len(images):
        tokens = images["tokens"].to_numpy(np.float64)

        def weighed(column: str) -> Weighted:
            values = images[column].to_numpy(np.float64)
            return lambda weights: (weights * tokens) @ values / (weights @ tokens)

        measured = {"vision_cosine": weighed("cosine"), "vision_error": weighed("error")}
        rows += _rows("all", measured, images["image"])
        worst = float(images["worst_cosine"].min())
        rows.append(("all", "worst_vision_cosine", worst, np.nan, np.nan, int(tokens.sum())))
    return pd.DataFrame(rows, columns=COLUMNS)
