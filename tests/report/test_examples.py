"""Tests of the examples: differences are marked at their position, and no text is lost or executed."""

from __future__ import annotations

import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.reference.golden import Golden
from hf2mnn.report.evidence import Evidence
from hf2mnn.report.examples import TOKEN, choose_examples, embed_images, grade, mark_differences

TEXT = st.text(st.sampled_from("ab &<>\"'\n左右红三ÄéてЖ🌟-;"), max_size=24)


@pytest.mark.parametrize(
    ("reference", "answer", "html"),
    [
        ("a red star", "a red star", "a red star"),
        ("a red star", "a blue star", "a <mark>blue</mark> star"),
        ("a red star", "a red", "a red<del> star</del>"),
        ("a red", "a red star", "a red<mark> star</mark>"),
        ("", "star", "<mark>star</mark>"),
        ("star", "", "<del>star</del>"),
        ("左上角是红色", "左下角是红色", "左<mark>下</mark>角是红色"),
        ("purple 1", "purple三角形", "purple<mark>三角形</mark>"),
        ("no", "</script>", "<mark>&lt;/script&gt;</mark>"),
        ("<b>", "<i>", "&lt;<mark>i</mark>&gt;"),
    ],
)
def test_differences_are_marked(reference: str, answer: str, html: str) -> None:
    assert mark_differences(reference, answer) == html


@given(TEXT, TEXT)
def test_both_answers_are_recovered_from_the_html(reference: str, answer: str) -> None:
    """Without <del> it is the answer; without <mark>, the rest is a subsequence of the reference."""
    assert "".join(TOKEN.findall(answer)) == answer
    html = str(mark_differences(reference, answer))
    without_deleted = re.sub(r"<del>.*?</del>", "", html, flags=re.DOTALL)
    assert unescape(re.sub(r"</?mark>", "", without_deleted)) == answer
    without_inserted = re.sub(r"<mark>.*?</mark>", "", html, flags=re.DOTALL)
    rest = iter(reference)
    assert all(letter in rest for letter in unescape(re.sub(r"</?del>", "", without_inserted)))
    assert ("<mark>" in html or "<del>" in html) == (reference != answer)


@pytest.mark.parametrize(
    ("score", "text"),
    [(None, ""), (float("nan"), ""), (1.0, "correct"), (0, "wrong"), (0.6, "60 % correct")],
)
def test_grades(score: float | None, text: str) -> None:
    assert grade(score) == text


def test_examples_with_most_differences_come_first(evidence: Evidence) -> None:
    golden = Golden(evidence.reference)
    answers = {variant.name: variant.answers for variant in evidence.variants}
    examples = choose_examples(golden, answers)
    assert {example.record["id"] for example in examples[:3]} == {"plain", "chinese", "free"}
    # The system prompt that all examples have is left out; one that a single example has is shown.
    assert all(len(example.messages) == 1 for example in examples)
    golden.records[0]["messages"][0]["content"] = "Be brief."
    messages = {example.record["id"]: example.messages for example in choose_examples(golden, answers)}
    assert messages["plain"][0] == ("system", "Be brief.")
    assert len(messages["chinese"]) == 1
    images = embed_images(golden, examples)
    assert set(images) == {"images/0.png", "images/1.png"}
    assert (images["images/0.png"].width, images["images/0.png"].height) == (56, 28)
