"""Figures and their intervals, against numpy and on small tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.evaluation.aggregate import COLUMNS, _correlation, _mean, _quantile, aggregate
from hf2mnn.figures import ANSWERS, IMAGES, POSITIONS, measured_on

NONE = pd.DataFrame(columns=["image", "tokens", "cosine", "worst_cosine", "error"])
POSITION = {"kld": 0.0, "same_top": True, "top5_overlap": 1.0, "reference_logprob": -1.0, "logprob": -1.0}
ANSWER = {
    "category": "any",
    "language": "en",
    "images": 0,
    "greedy_match": True,
    "prefix_share": 1.0,
    "prefix_tokens": 2,
    "repetition": 0.0,
    "degenerate": False,
    "score": None,
    "reference_score": None,
    "as_called_match": None,
    "as_called_score": None,
    "tokenizer_match": None,
    "template_match": None,
}


def positions(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({**{key: [value] * len(columns["id"]) for key, value in POSITION.items()}, **columns})


def answers(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({**{key: [value] * len(columns["id"]) for key, value in ANSWER.items()}, **columns})


def measured(table: pd.DataFrame, figure: str, group: str = "all") -> pd.Series:
    (row,) = [row for _, row in table.iterrows() if (row["group"], row["figure"]) == (group, figure)]
    return row


floats = st.floats(-100, 100)
weighed = st.lists(st.tuples(floats, st.integers(0, 4)), min_size=1, max_size=12).filter(
    lambda pairs: any(weight for _, weight in pairs)
)


@given(weighed, st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999, 1.0]))
@settings(max_examples=40, deadline=None)
def test_weighted_quantile_equals_quantile_of_repeated_values(pairs: list, share: float) -> None:
    """A row with weight 2 counts twice, a row with weight 0 does not count."""
    values, weights = (np.array(side) for side in zip(*pairs, strict=True))
    expected = np.quantile(np.repeat(values, weights), share, method="inverted_cdf")
    assert _quantile(pd.Series(values), share)(weights[None].astype(float)) == expected


@given(weighed)
@settings(max_examples=25, deadline=None)
def test_weighted_mean_equals_mean_of_repeated_values(pairs: list) -> None:
    values, weights = (np.array(side) for side in zip(*pairs, strict=True))
    expected = np.repeat(values, weights).mean()
    np.testing.assert_allclose(_mean(pd.Series(values))(weights[None].astype(float)), expected, atol=1e-9)


def test_weighted_correlation_equals_numpys_of_repeated_values() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 40)) + random.normal(size=40)
    weights = random.integers(0, 4, (5, 40))
    actual = _correlation(pd.Series(x), pd.Series(y))(weights.astype(float))
    expected = [np.corrcoef(np.repeat(x, row), np.repeat(y, row))[0, 1] for row in weights]
    np.testing.assert_allclose(actual, expected, atol=1e-9)
    assert np.isnan(_correlation(pd.Series([1.0, 1.0]), pd.Series([1.0, 2.0]))(np.ones((1, 2)))).all()


def test_each_figure_has_its_definition() -> None:
    """Probabilities 1/2 and 1/4 become 1/4 and 1/4: perplexities sqrt(8) and 4, a change of 1/4 at one of two."""
    table = aggregate(
        positions(
            id=["a", "b"],
            kld=[0.1, 0.5],
            same_top=[True, False],
            top5_overlap=[1.0, 0.6],
            reference_logprob=np.log([1 / 2, 1 / 4]),
            logprob=np.log([1 / 4, 1 / 4]),
        ),
        answers(
            id=["a", "b"],
            greedy_match=[True, False],
            prefix_share=[1.0, 0.5],
            prefix_tokens=[4, 2],
            repetition=[0.0, 0.2],
            degenerate=[False, True],
        ),
        NONE,
    )
    assert list(table.columns) == COLUMNS
    expected = {
        "mean_kld": 0.3,
        "median_kld": 0.1,
        "p90_kld": 0.5,
        "max_kld": 0.5,
        "rms_probability_change": np.sqrt(1 / 32),
        "top1_agreement": 0.5,
        "top5_overlap": 0.8,
        "reference_perplexity": np.sqrt(8),
        "perplexity": 4,
        "perplexity_ratio": np.sqrt(2),
        "common_prefix_tokens": 3,
        "greedy_match": 0.5,
        "common_prefix": 0.75,
        "repetition": 0.1,
        "degenerate": 0.5,
    }
    assert {figure: measured(table, figure)["value"] for figure in expected} == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-20, -0.001), st.floats(-20, -0.001)), min_size=1, max_size=9))
@settings(max_examples=10, deadline=None)
def test_perplexity_ratio_is_the_quotient_of_perplexities(pairs: list[tuple[float, float]]) -> None:
    """The ratio is above 1 where PyTorch's tokens lose probability."""
    reference, other = (list(side) for side in zip(*pairs, strict=True))
    ids = [str(index) for index in range(len(pairs))]
    table = aggregate(positions(id=ids, reference_logprob=reference, logprob=other), answers(id=ids), NONE)
    ratio = measured(table, "perplexity_ratio")["value"]
    assert ratio == pytest.approx(np.exp(np.mean(np.subtract(reference, other))))
    assert ratio == pytest.approx(
        measured(table, "perplexity")["value"] / measured(table, "reference_perplexity")["value"]
    )


def noisy(examples: int, each: int, by_example: bool) -> pd.DataFrame:
    """Return divergences that are equal within an example, or independent."""
    random = np.random.default_rng(4)
    ids = np.repeat([f"{index:03}" for index in range(examples)], each)
    values = np.repeat(random.exponential(size=examples), each) if by_example else random.exponential(size=len(ids))
    return positions(id=ids.tolist(), kld=values.tolist())


def interval(table: pd.DataFrame, figure: str = "mean_kld") -> tuple[float, float, float]:
    row = measured(aggregate(table, answers(id=sorted(set(table["id"]))), NONE), figure)
    return row["low"], row["value"], row["high"]


@pytest.mark.parametrize("figure", ["mean_kld", "median_kld", "p90_kld"])
def test_intervals_contain_the_value_and_narrow_with_more_examples(figure: str) -> None:
    widths = []
    for examples in (10, 100, 1000):
        low, value, high = interval(noisy(examples, 2, by_example=True), figure)
        assert low < value < high
        widths.append(high - low)
    assert widths[0] > 1.2 * widths[1] > 1.44 * widths[2]


def test_intervals_resample_examples_not_positions() -> None:
    """40 correlated positions in 4 answers are 4 observations: the interval is three times wider than for 40.

    More positions of the same example do not narrow it.
    """
    low, _, high = interval(noisy(4, 10, by_example=True))
    again_low, _, again_high = interval(noisy(4, 100, by_example=True))
    assert (low, high) == pytest.approx((again_low, again_high))
    apart = noisy(4, 10, by_example=True).assign(id=[f"{index:03}" for index in range(40)])
    apart_low, _, apart_high = interval(apart)
    assert high - low > 2 * (apart_high - apart_low)


def test_interval_of_many_independent_values_is_that_of_the_normal_distribution() -> None:
    """The mean of 200 answers of one position has 1.96 standard errors on either side."""
    table = noisy(200, 1, by_example=False)
    low, value, high = interval(table)
    error = table["kld"].std() / np.sqrt(200)
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=0.2)


def test_equal_tables_give_equal_intervals() -> None:
    table = noisy(12, 3, by_example=False)
    assert interval(table) == interval(table)


def test_text_images_categories_and_languages_are_groups() -> None:
    """Each group has the positions and answers of its examples, and their number."""
    table = aggregate(
        positions(id=["a", "a", "b", "c"], kld=[1.0, 3.0, 10.0, 100.0]),
        answers(
            id=["a", "b", "c"],
            images=[0, 1, 2],
            category=["count", "count", "colour"],
            language=["en", "zh", "zh"],
            greedy_match=[True, False, True],
        ),
        NONE,
    )
    means = table[table["figure"] == "mean_kld"].set_index("group")
    assert means["value"].to_dict() == {
        "all": 28.5,
        "text": 2,
        "after an image": 55,
        "category colour": 100,
        "category count": pytest.approx(14 / 3),
        "language en": 2,
        "language zh": 55,
    }
    assert means["count"].to_dict()["category count"] == 3
    matches = table[table["figure"] == "greedy_match"].set_index("group")
    assert matches["value"].to_dict()["language zh"] == 0.5
    assert matches["count"].to_dict()["language zh"] == 2


def test_a_single_category_or_language_is_no_group() -> None:
    table = aggregate(positions(id=["a", "b"]), answers(id=["a", "b"]), NONE)
    assert sorted(set(table["group"])) == ["all", "text"]


def test_examples_without_a_label_do_not_count() -> None:
    """One of two labelled examples is right; an unlabelled example is neither right nor wrong."""
    some = answers(id=list("abc"), score=[1.0, None, 0.0], images=[0, 1, 0])
    table = aggregate(positions(id=list("abc")), some, NONE)
    row = measured(table, "task_accuracy")
    assert (row["value"], row["count"]) == (0.5, 2)
    assert table[
        table["figure"].isin(["reference_accuracy", "as_called_match", "tokenizer_match", "template_match"])
    ].empty
    assert "after an image" not in set(table[table["figure"] == "task_accuracy"]["group"])


def test_images_are_weighted_by_their_tokens() -> None:
    """An image of 30 tokens has thirty times the weight of one with 1; the lowest cosine is not weighted."""
    images = pd.DataFrame(
        {"image": ["s", "l"], "tokens": [1, 30], "cosine": [0, 1], "worst_cosine": [-0.5, 0.25], "error": [0.31, 0]}
    )
    table = aggregate(positions(id=["a"]), answers(id=["a"]), images)
    assert measured(table, "vision_cosine")["value"] == pytest.approx(30 / 31)
    assert measured(table, "vision_error")["value"] == pytest.approx(0.01)
    assert measured(table, "worst_vision_cosine")[["value", "count"]].tolist() == [-0.5, 31]


def test_a_figure_that_is_not_finite_has_no_interval() -> None:
    """The correlation with a constant is NaN, not 0 or 1."""
    row = measured(aggregate(positions(id=["a", "b"]), answers(id=["a", "b"]), NONE), "logprob_correlation")
    assert row[["value", "low", "high"]].isna().all()


def test_every_registered_figure_is_measured_and_every_measured_figure_is_registered() -> None:
    """A figure that is only registered, or only measured, would be missing somewhere."""
    images = pd.DataFrame({"image": ["a"], "tokens": [1], "cosine": [1], "worst_cosine": [1], "error": [0]})
    columns = [column for column, value in ANSWER.items() if value is None]
    table = aggregate(positions(id=["a"]), answers(id=["a"], **{column: [1.0] for column in columns}), images)
    assert set(table["figure"]) == {figure.name for figure in measured_on(POSITIONS, ANSWERS, IMAGES)}
