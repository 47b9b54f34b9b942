"""Figures with 95 % intervals from the tables of positions, answers and images, for the whole set and for groups.

Intervals are percentile bootstraps over examples, not over positions, since the positions of one answer are correlated
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 8.5).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from hf2mnn.figures import ANSWERS, POSITIONS, measured_on

COLUMNS = ["group", "figure", "value", "low", "high", "count"]
RESAMPLES, SEED = 500, 0

Weighted = Callable[[np.ndarray], np.ndarray]
"""Function from weights [resamples, rows] to one value for each resample."""


def _mean(values: pd.Series) -> Weighted:
    column = values.to_numpy(np.float64)
    return lambda weights: weights @ column / weights.sum(axis=1)


def _quantile(values: pd.Series, share: float) -> Weighted:
    """Return the smallest value with at least `share` of the weight at or below it."""
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
        covariance = weights @ (x * y) / total - mean_x * mean_y
        variances = (weights @ x**2 / total - mean_x**2) * (weights @ y**2 / total - mean_y**2)
        undefined = np.full(len(covariance), np.nan)
        return np.divide(covariance, np.sqrt(np.maximum(variances, 0)), out=undefined, where=variances > 0)

    return of


def _position_figures(positions: pd.DataFrame) -> dict[str, Weighted]:
    change = np.exp(positions["logprob"]) - np.exp(positions["reference_logprob"])
    squared, lost = _mean(change**2), _mean(positions["reference_logprob"] - positions["logprob"])
    reference, other = _mean(-positions["reference_logprob"]), _mean(-positions["logprob"])
    averaged = {
        figure.name: _quantile(positions[figure.column], figure.quantile)
        if figure.quantile
        else _mean(positions[figure.column])
        for figure in measured_on(POSITIONS)
        if figure.column
    }
    return averaged | {
        "rms_probability_change": lambda weights: np.sqrt(squared(weights)),
        "reference_perplexity": lambda weights: np.exp(reference(weights)),
        "perplexity": lambda weights: np.exp(other(weights)),
        "perplexity_ratio": lambda weights: np.exp(lost(weights)),
        "logprob_correlation": _correlation(positions["reference_logprob"], positions["logprob"]),
    }


def _with_intervals(group: str, figures: dict[str, Weighted], examples: pd.Series) -> list[tuple]:
    """Return rows of COLUMNS; `examples` has the example id of each row of the table that the figures average."""
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
    """Return positions and answers of the whole set, of text, of text after an image, and of categories and languages.

    Categories and languages are groups only where there are several.
    """
    with_image = answers["images"] > 0
    masks = {"all": pd.Series(True, index=answers.index), "text": ~with_image, "after an image": with_image}
    for column in ("category", "language"):
        values = sorted(answers[column].unique())
        masks |= {f"{column} {value}": answers[column] == value for value in values if len(values) > 1}
    groups = {}
    for name, mask in masks.items():
        members = answers[mask]
        if len(members):
            groups[name] = (positions[positions["id"].isin(members["id"])], members)
    return groups


def aggregate(positions: pd.DataFrame, answers: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return a table with COLUMNS: each figure of each group, its 95 % interval, and the number of rows behind it."""
    rows = []
    for group, (group_positions, group_answers) in _groups(positions, answers).items():
        rows += _with_intervals(group, _position_figures(group_positions), group_positions["id"])
        for figure in measured_on(ANSWERS):
            # An example without a value does not count.
            known = group_answers[group_answers[figure.column].notna()]
            if len(known):
                rows += _with_intervals(group, {figure.name: _mean(known[figure.column].astype(float))}, known["id"])
    if len(images):
        tokens = images["tokens"].to_numpy(np.float64)

        def over_tokens(column: str) -> Weighted:
            values = images[column].to_numpy(np.float64)
            return lambda weights: (weights * tokens) @ values / (weights @ tokens)

        figures = {"vision_cosine": over_tokens("cosine"), "vision_error": over_tokens("error")}
        rows += _with_intervals("all", figures, images["image"])
        worst = float(images["worst_cosine"].min())
        rows.append(("all", "worst_vision_cosine", worst, np.nan, np.nan, int(tokens.sum())))
    return pd.DataFrame(rows, columns=COLUMNS)
