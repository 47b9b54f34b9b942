"""NFC as ordered replacements gives the text of tokenizers' NFC."""

from __future__ import annotations

import unicodedata
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.normalizers import NFC

from hf2mnn.mnn.nfc import LONGEST_RUN, nfc_replacements

# Marks that texts of a script put on one letter: vowels, doubling, tones, cantillation.
USUAL_MARKS = {
    "Arabic": ("\u0628\u0627\u0648", "\u064b\u064e\u0650\u0651\u0652\u0653\u0654\u0670\u06e2"),
    "Hebrew": ("\u05d1\u05e9", "\u05b0\u05b7\u05bc\u05c1\u05c2\u05bd\u0591"),
    "Burmese": ("\u1000", "\u1037\u1039\u103a"),
    "Thai": ("\u0e01", "\u0e38\u0e48\u0e49"),
    "Hindi": ("\u0915\u0928", "\u093c\u094d\u0951\u0952"),
    "Vietnamese, quality": ("aeoAEO", "\u0302\u0323\u0301\u0300"),
    "Vietnamese, horn": ("ouOU", "\u031b\u0323\u0301\u0303\u0309"),
    "Syriac": ("\u0712", "\u0711\u0730\u0731\u0740"),
}


def replace(text: str) -> str:
    for pattern, content in nfc_replacements():
        text = text.replace(pattern, content)
    return text


def test_every_composed_character() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    changing = [c for c in characters if unicodedata.normalize("NFD", c) != c]
    text = " ".join(changing + [unicodedata.normalize("NFD", c) for c in changing])
    assert len(changing) > 13000
    assert replace(text) == NFC().normalize_str(text)


@pytest.mark.parametrize("language", USUAL_MARKS)
def test_marks_in_every_order(language: str) -> None:
    letters, marks = USUAL_MARKS[language]
    runs = ["".join(run) for length in (2, 3) for run in permutations(marks, length)]
    text = " ".join(letter + run for letter, run in product(letters, runs))
    assert text != NFC().normalize_str(text)
    assert replace(text) == NFC().normalize_str(text)


@given(st.text(st.sampled_from("\u064b\u064c\u064e\u0650\u0651\u0652\u0670\u06e1"), max_size=LONGEST_RUN))
def test_longest_run_of_marks(run: str) -> None:
    assert replace(f"\u0644{run}\u0647") == NFC().normalize_str(f"\u0644{run}\u0647")


def test_longer_runs_may_stay_unsorted() -> None:
    """The limit that docs/tokenizers.md states is the real one."""
    run = "\u0670\u0652\u0651\u0650\u064e\u064d\u064c\u064b"
    assert replace(run) != NFC().normalize_str(run)
