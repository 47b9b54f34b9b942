"""Differences are marked where they are, and nothing of an answer is lost or run."""

from __future__ import annotations

import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf2mnn.report.differences import marked, tokens

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
def test_what_differs_is_marked(reference: str, answer: str, html: str) -> None:
    assert marked(reference, answer) == html


@given(TEXT)
def test_tokens_are_the_text(text: str) -> None:
    assert "".join(tokens(text)) == text


@given(TEXT, TEXT)
def test_both_answers_can_be_read_back(reference: str, answer: str) -> None:
    """Without what is left out it is the answer; all that is PyTorch's stays in PyTorch's order."""
    html = str(marked(reference, answer))
    without = re.sub(r"<del>.*?</del>", "", html, flags=re.DOTALL)
    assert unescape(re.sub(r"</?mark>", "", without)) == answer
    kept = unescape(re.sub(r"</?del>", "", re.sub(r"<mark>.*?</mark>", "", html, flags=re.DOTALL)))
    rest = iter(reference)
    assert all(letter in rest for letter in kept)
    assert ("<mark>" in html or "<del>" in html) == (reference != answer)
