"""Metrics of answers, as public benchmarks define them; each is from 0 to 1."""

from __future__ import annotations

import math
import re

_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS.split())}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't o'clock oughtn't shan't should've shouldn't shouldn't've somebody'll somebody's someone'd someone'll
someone's something'd something'll that's there'd there're there's they'd they'd've they'll they're they've
'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
TOLERANCE = 0.05  # relative error of a number that counts as right
THRESHOLD = 0.5  # share of edited characters from which an answer is wrong

# A letter alone ("B", "b.", "(B)"), in front of its option ("B. cat", "(B) cat"), after an announcement ("the answer is
# B"), or in brackets anywhere. Other capitals do not count: "A cat" names no option.
LETTER = re.compile(r"\W*([A-Za-z])\W*")
FRONT = re.compile(r"\W*(?:([A-Z])[.):\n]|\(([A-Z])\))")
ANNOUNCED = re.compile(r"(?i:answer|option|choice|choose|答案|选)(?i:\s+is|是|为)?[\s:：*(（]*([A-Z])(?![A-Za-z'])")
BRACKETS = re.compile(r"[(（]([A-Z])[)）]")


def exact(answer: str, expected: list[str]) -> float:
    """Return 1 if the answer is one of the expected ones, apart from surrounding white space."""
    return float(answer.strip() in {label.strip() for label in expected})


def normalize(text: str) -> str:
    """Normalize an answer as the evaluation script of VQA and TextVQA does.

    Lower case; numbers up to ten as digits; no articles; contractions with their apostrophe; punctuation removed beside
    a space, else replaced by a space.
    """
    text = " ".join(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").split())
    cleaned = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space else " ")
    words = (NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", cleaned).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(answer: str, expected: list[str]) -> float:
    """Return the VQA accuracy (Antol et al. 2015, arXiv:1505.00468, in its script for ten annotators; TextVQA).

    min(annotators with this answer / 3, 1), averaged over leaving out each annotator once. With fewer than four
    annotators all remaining ones must agree; a single annotator is not left out.
    """
    given, labels = normalize(answer), [normalize(label) for label in expected]
    if len(labels) == 1:
        return float(given == labels[0])
    same, needed = labels.count(given), min(3, len(labels) - 1)
    return sum(min((same - (label == given)) / needed, 1.0) for label in labels) / len(labels)


def edits(one: str, other: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and replacements of characters."""
    row = list(range(len(other) + 1))
    for line, left in enumerate(one, 1):
        diagonal, row[0] = row[0], line
        for column, right in enumerate(other, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (left != right))
    return row[-1]


def anls(answer: str, expected: list[str]) -> float:
    """Return the normalized Levenshtein similarity, case-insensitive (Biten et al. 2019, arXiv:1905.13648; DocVQA).

    It is the maximum over the labels, and 0 if at least half of the longer text's characters differ.
    """
    given, *labels = (" ".join(text.lower().split()) for text in [answer, *expected])
    distance = min(edits(given, label) / max(len(given), len(label), 1) for label in labels)
    return 1 - distance if distance < THRESHOLD else 0.0


def _number(text: str) -> float:
    """Return the number or the percentage of a text, or NaN."""
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return math.nan


def relaxed(answer: str, expected: list[str]) -> float:
    """Return the relaxed accuracy (Methani et al. 2020, arXiv:1909.00997; ChartQA).

    A number may differ by 5 %; other text must be equal, case-insensitive.
    """
    given = answer.strip()
    for label in map(str.strip, expected):
        wanted = _number(label)
        is_close = math.isfinite(wanted) and abs(_number(given) - wanted) <= TOLERANCE * abs(wanted)
        if is_close or given.lower() == label.lower():
            return 1.0
    return 0.0


def chosen(answer: str) -> str | None:
    """Return the letter of the option that an answer names, as a capital, or None."""
    if alone := LETTER.fullmatch(answer):
        return alone[1].upper()
    if front := FRONT.match(answer):
        return front[1] or front[2]
    named = ANNOUNCED.findall(answer) or BRACKETS.findall(answer)
    return named[-1] if named else None


def choice(answer: str, expected: list[str]) -> float:
    """Return 1 if the answer names the letter of the right option.

    Letters are extracted as by MMMU (Yue et al. 2023, arXiv:2311.16502) and MMBench (Liu et al. 2023,
    arXiv:2307.06281). An answer without a letter is wrong; none is guessed.
    """
    return float(chosen(answer) in {label.strip().upper() for label in expected})


METRICS = {metric.__name__: metric for metric in (exact, vqa, anls, relaxed, choice)}


def score_answer(metric: str, answer: str, expected: list[str]) -> float:
    """Return the score of an answer; `metric` is a key of METRICS, and `expected` is not empty."""
    return METRICS[metric](answer, expected)
