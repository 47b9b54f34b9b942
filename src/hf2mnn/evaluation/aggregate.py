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


def _mean(values: pd.Series, then: Callable[[np.ndarray], np.ndarray] = np.positive) -> Weighted:
    """Return the weighted mean, to which `then` is applied."""
    column = values.to_numpy(np.float64)
    return lambda weights: then(weights @ column / weights.sum(axis=1))


def _quantile(values: pd.Series, share: float) -> Weighted:
    """Return the smallest value with at least `share` of the weight at or below it."""
    column = values.to_numpy(np.float64)
    order = np.argsort(column, kind="stable")

    def of(weights: np.ndarray) -> np.ndarray:
        below = np.cumsum(weights[:, order], axis=1)
        reached = below >= share * below[:, -1:] - 1e-9
        return column[order][reached.argmax(axis=1)]

    return of


def _correlation(x: pd.Series, y: pd.Series) -> Weighted:
    means = [_mean(values) for values in (x, y, x * y, x**2, y**2)]

    def of(weights: np.ndarray) -> np.ndarray:
        mean_x, mean_y, mean_xy, mean_xx, mean_yy = (mean(weights) for mean in means)
        covariance = mean_xy - mean_x * mean_y
        variances = (mean_xx - mean_x**2) * (mean_yy - mean_y**2)
        undefined = np.full(len(covariance), np.nan)
        return np.divide(covariance, np.sqrt(np.maximum(variances, 0)), out=undefined, where=variances > 0)

    return of


def _position_figures(positions: pd.DataFrame) -> dict[str, Weighted]:
    figures = {}
    for figure in measured_on(POSITIONS):
        if figure.column:
            column = positions[figure.column]
            figures[figure.name] = _quantile(column, figure.quantile) if figure.quantile else _mean(column)
    reference, other = positions["reference_logprob"], positions["logprob"]
    return figures | {
        "rms_probability_change": _mean((np.exp(other) - np.exp(reference)) ** 2, np.sqrt),
        "reference_perplexity": _mean(-reference, np.exp),
        "perplexity": _mean(-other, np.exp),
        "perplexity_ratio": _mean(reference - other, np.exp),
        "logprob_correlation": _correlation(reference, other),
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


def _groups(answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the answers of the whole set, of text, of text after an image, and of categories and languages.

    Categories and languages are groups only where there are several.
    """
    with_image = answers["images"] > 0
    groups = {"all": answers, "text": answers[~with_image], "after an image": answers[with_image]}
    for column in ("category", "language"):
        if answers[column].nunique() > 1:
            groups |= {f"{column} {value}": members for value, members in answers.groupby(column)}
    return {name: members for name, members in groups.items() if len(members)}


def aggregate(positions: pd.DataFrame, answers: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return a table with COLUMNS: each figure of each group, its 95 % interval, and the number of rows behind it."""
    rows = []
    for group, members in _groups(answers).items():
        own = positions[positions["id"].isin(members["id"])]
        rows += _with_intervals(group, _position_figures(own), own["id"])
        for figure in measured_on(ANSWERS):
            # An example without a value does not count.
            known = members.dropna(subset=figure.column)
            if len(known):
                rows += _with_intervals(group, {figure.name: _mean(known[figure.column])}, known["id"])
    if len(images):
        tokens = images["tokens"].to_numpy(np.float64)
        cosine, error = _mean(images["cosine"]), _mean(images["error"])
        figures = {
            "vision_cosine": lambda weights: cosine(weights * tokens),
            "vision_error": lambda weights: error(weights * tokens),
        }
        rows += _with_intervals("all", figures, images["image"])
        worst = float(images["worst_cosine"].min())
        rows.append(("all", "worst_vision_cosine", worst, np.nan, np.nan, int(tokens.sum())))
    return pd.DataFrame(rows, columns=COLUMNS)
