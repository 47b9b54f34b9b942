"""Figures and their intervals, against numpy where it has them, and on tables small enough to count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf2mnn.evaluation.figures import COLUMNS, _correlation, _mean, _quantile, figures

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
@settings(max_examples=100, deadline=None)
def test_a_quantile_with_weights_is_that_of_the_values_written_out(pairs: list, share: float) -> None:
    """A row that is drawn twice counts twice, one that is not drawn is not there."""
    values, weights = (np.array(side) for side in zip(*pairs, strict=True))
    expected = np.quantile(np.repeat(values, weights), share, method="inverted_cdf")
    assert _quantile(pd.Series(values), share)(weights[None].astype(float)) == expected


@given(weighed)
@settings(max_examples=60, deadline=None)
def test_a_mean_with_weights_is_that_of_the_values_written_out(pairs: list) -> None:
    values, weights = (np.array(side) for side in zip(*pairs, strict=True))
    expected = np.repeat(values, weights).mean()
    np.testing.assert_allclose(_mean(pd.Series(values))(weights[None].astype(float)), expected, atol=1e-9)


def test_a_correlation_with_weights_is_numpys_of_the_values_written_out() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 40)) + random.normal(size=40)
    weights = random.integers(0, 4, (5, 40))
    found = _correlation(pd.Series(x), pd.Series(y))(weights.astype(float))
    expected = [np.corrcoef(np.repeat(x, row), np.repeat(y, row))[0, 1] for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.isnan(_correlation(pd.Series([1.0, 1.0]), pd.Series([1.0, 2.0]))(np.ones((1, 2)))).all()


def test_each_figure_is_the_one_it_is_called() -> None:
    """Probabilities 1/2 and 1/4 become 1/4 and 1/4: perplexities sqrt(8) and 4, a change of 1/4 at one of two."""
    table = figures(
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
    found = {figure: measured(table, figure)["value"] for figure in expected}
    assert found == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(-20, -0.001), st.floats(-20, -0.001)), min_size=1, max_size=9))
@settings(max_examples=25, deadline=None)
def test_the_ratio_of_perplexities_is_that_of_their_quotient(pairs: list[tuple[float, float]]) -> None:
    """And above 1 where the right tokens lost probability."""
    reference, other = (list(side) for side in zip(*pairs, strict=True))
    ids = [str(index) for index in range(len(pairs))]
    table = figures(positions(id=ids, reference_logprob=reference, logprob=other), answers(id=ids), NONE)
    ratio = measured(table, "perplexity_ratio")["value"]
    assert ratio == pytest.approx(np.exp(np.mean(np.subtract(reference, other))))
    assert ratio == pytest.approx(
        measured(table, "perplexity")["value"] / measured(table, "reference_perplexity")["value"]
    )


def noisy(examples: int, each: int, by_example: bool) -> pd.DataFrame:
    """Divergences of some examples that are the same within an example, or of the same spread everywhere."""
    random = np.random.default_rng(4)
    ids = np.repeat([f"{index:03}" for index in range(examples)], each)
    values = np.repeat(random.exponential(size=examples), each) if by_example else random.exponential(size=len(ids))
    return positions(id=ids.tolist(), kld=values.tolist())


def interval(table: pd.DataFrame, figure: str = "mean_kld") -> tuple[float, float, float]:
    found = figures(table, answers(id=sorted(set(table["id"]))), NONE)
    row = measured(found, figure)
    return row["low"], row["value"], row["high"]


@pytest.mark.parametrize("figure", ["mean_kld", "median_kld", "p90_kld"])
def test_intervals_hold_the_value_and_narrow_with_more_examples(figure: str) -> None:
    widths = []
    for examples in (10, 100, 1000):
        low, value, high = interval(noisy(examples, 2, by_example=True), figure)
        assert low < value < high
        widths.append(high - low)
    assert widths[0] > 1.2 * widths[1] > 1.44 * widths[2]


def test_intervals_are_those_of_examples_not_of_positions() -> None:
    """40 positions that hang together in 4 answers are 4 observations: three times wider than 40 would be. A position
    more of the same example narrows nothing.
    """
    low, _, high = interval(noisy(4, 10, by_example=True))
    again_low, _, again_high = interval(noisy(4, 100, by_example=True))
    assert (low, high) == pytest.approx((again_low, again_high))
    apart = noisy(4, 10, by_example=True).assign(id=[f"{index:03}" for index in range(40)])
    apart_low, _, apart_high = interval(apart)
    assert high - low > 2 * (apart_high - apart_low)


def test_an_interval_is_the_one_of_the_normal_distribution_where_that_holds() -> None:
    """Mean of 200 answers of one position: 1.96 standard errors to either side."""
    table = noisy(200, 1, by_example=False)
    low, value, high = interval(table)
    error = table["kld"].std() / np.sqrt(200)
    assert (value - low, high - value) == pytest.approx((1.96 * error, 1.96 * error), rel=0.2)


def test_the_same_tables_give_the_same_numbers() -> None:
    table = noisy(12, 3, by_example=False)
    assert interval(table) == interval(table)


def test_text_images_categories_and_languages_are_told_apart() -> None:
    """Each group holds its own examples' positions and answers, and `count` says how many."""
    table = figures(
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


def test_groups_that_are_the_whole_set_are_not_told_apart() -> None:
    table = figures(positions(id=["a", "b"]), answers(id=["a", "b"]), NONE)
    assert sorted(set(table["group"])) == ["all", "text"]


def test_examples_without_a_label_do_not_count() -> None:
    """Half of what is labelled is right; an unlabelled example is neither right nor wrong."""
    table = figures(positions(id=list("abc")), answers(id=list("abc"), score=[1.0, None, 0.0], images=[0, 1, 0]), NONE)
    row = measured(table, "task_accuracy")
    assert (row["value"], row["count"]) == (0.5, 2)
    assert table[
        table["figure"].isin(["reference_accuracy", "as_called_match", "tokenizer_match", "template_match"])
    ].empty
    assert "after an image" not in set(table[table["figure"] == "task_accuracy"]["group"])


def test_images_weigh_by_their_tokens() -> None:
    """An image of 30 image tokens is thirty times what one of 1 is; the worst token is told as it is."""
    images = pd.DataFrame(
        {"image": ["s", "l"], "tokens": [1, 30], "cosine": [0, 1], "worst_cosine": [-0.5, 0.25], "error": [0.31, 0]}
    )
    table = figures(positions(id=["a"]), answers(id=["a"]), images)
    assert measured(table, "vision_cosine")["value"] == pytest.approx(30 / 31)
    assert measured(table, "vision_error")["value"] == pytest.approx(0.01)
    assert measured(table, "worst_vision_cosine")[["value", "count"]].tolist() == [-0.5, 31]


def test_a_figure_that_is_not_finite_has_no_interval() -> None:
    """A constant has no correlation with anything: that is said, not 0 or 1."""
    row = measured(figures(positions(id=["a", "b"]), answers(id=["a", "b"]), NONE), "logprob_correlation")
    assert row[["value", "low", "high"]].isna().all()
