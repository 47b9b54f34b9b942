"""Metrics of answers, on examples from the papers and their scripts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.reference.tasks import METRICS, chosen, edits, normalize, score_answer

SHORT = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=15)


@given(metric=st.sampled_from(sorted(METRICS)), answer=SHORT, expected=st.lists(SHORT, min_size=1, max_size=11))
def test_every_score_is_between_0_and_1(metric: str, answer: str, expected: list[str]) -> None:
    assert 0 <= score_answer(metric, answer, expected) <= 1


@given(
    metric=st.sampled_from(sorted(set(METRICS) - {"choice", "vqa"})), label=SHORT, others=st.lists(SHORT, max_size=3)
)
def test_the_label_itself_is_right(metric: str, label: str, others: list[str]) -> None:
    assert score_answer(metric, label, [*others, label]) == 1


@given(label=SHORT, annotators=st.integers(1, 12))
def test_the_answer_of_all_annotators_is_right(label: str, annotators: int) -> None:
    assert score_answer("vqa", label, [label] * annotators) == pytest.approx(1)


@given(st.sampled_from("ABCDEFGHIJ"))
def test_the_letter_itself_is_right(letter: str) -> None:
    assert score_answer("choice", letter, [letter]) == 1


def test_exact_is_equality_but_for_white_space() -> None:
    assert score_answer("exact", " a star\n", ["a circle", "a star"]) == 1
    assert score_answer("exact", "A star", ["a star"]) == 0


@pytest.mark.parametrize(("same", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_with_ten_annotators(same: int, score: float) -> None:
    """The mean over leaving out one of ten: 0.3 for each agreement, up to 1 (table on the page of VQA)."""
    labels = ["red"] * same + [f"other {i}" for i in range(10 - same)]
    assert score_answer("vqa", "Red.", labels) == pytest.approx(score)


@pytest.mark.parametrize(
    ("labels", "score"), [(["red"], 1), (["red", "red"], 1), (["red", "blue"], 0.5), (["blue"], 0)]
)
def test_vqa_accuracy_with_few_annotators(labels: list[str], score: float) -> None:
    """With so few, the three agreements of the script are impossible."""
    assert score_answer("vqa", "red", labels) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Two Cats.", "2 cats"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("coca-cola", "coca cola"),
        ("yes , no", "yes no"),
        ("dont walk", "don't walk"),
        ("an apple\nand a pear", "apple and pear"),
        ("man's", "man 's"),
    ],
)
def test_normal_form_is_that_of_the_script(text: str, form: str) -> None:
    assert normalize(text) == form


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("", "", 0)],
)
def test_edits_are_levenshteins(one: str, other: str, distance: int) -> None:
    assert edits(one, other) == edits(other, one) == distance


@given(one=SHORT, other=SHORT)
def test_edits_are_a_distance(one: str, other: str) -> None:
    assert edits(one, other) == edits(other, one)
    assert abs(len(one) - len(other)) <= edits(one, other) <= max(len(one), len(other))
    assert (edits(one, other) == 0) == (one == other)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("T.F. Riehl", ["T.F. Riehl", "TF Riehl"], 1),
        ("t.f. RIEHL", ["T.F. Riehl"], 1),
        ("TF Riehl", ["T.F. Riehl"], 0.8),  # 2 of 10 characters
        ("abcx", ["abcd"], 0.75),
        ("abxx", ["abcd"], 0),  # half of the characters is too much
        ("no idea", ["T.F. Riehl"], 0),
        ("", ["x"], 0),
    ],
)
def test_anls_is_one_less_the_share_of_edits(answer: str, expected: list[str], score: float) -> None:
    assert score_answer("anls", answer, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("95", "100", True),
        ("105", "100", True),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0.0", "0", True),
        ("0.01", "0", False),
        ("52%", "50%", True),
        ("0.5", "50%", True),
        ("Yes", "yes", True),
        ("yes it is", "yes", False),
        ("2014", "2014", True),
        ("nan", "nan", True),
        ("nan", "3", False),
        ("inf", "3", False),
    ],
)
def test_relaxed_accuracy_forgives_5_percent(answer: str, label: str, right: bool) -> None:
    assert score_answer("relaxed", answer, [label]) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B. a cat", "B"),
        ("(B) a cat", "B"),
        ("B) a cat", "B"),
        ("B: a cat", "B"),
        ("B\nbecause A is a dog", "B"),
        ("The answer is B", "B"),
        ("The answer is (B) a cat.", "B"),
        ("The correct option is B, not A.", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The options are many, but it must be (B).", "B"),
        ("答案是B。", "B"),
        ("选 B", "B"),
        ("First answer A; no, the answer is B", "B"),
        ("A cat", None),
        ("I think so", None),
        ("the answer is a cat", None),
        ("The answer is Berlin", None),
        ("", None),
        ("猫", None),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str | None) -> None:
    """And no letter for an answer without one: a guess would be right one time in four."""
    assert chosen(answer) == letter
    assert score_answer("choice", answer, ["B"]) == (letter == "B")
