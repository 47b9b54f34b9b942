"""Examples of the report: prompts, images and answers, with differences from PyTorch's answer marked."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup
from PIL import Image

from hf2mnn.reference.examples import content_parts
from hf2mnn.reference.golden import Golden

MAX_EXAMPLES = 40
MAX_SIDE = 512
"""Longest side of an embedded image in pixels."""
LANGUAGE = re.compile(r"(?!any$)[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{CJK}]|[^\W{CJK}]+|\s+|.", re.DOTALL)
"""A word, a run of white space, a punctuation mark, or a single CJK character."""
MARKS = {"equal": "{}", "delete": "<del>{}</del>", "insert": "<mark>{}</mark>", "replace": "<mark>{}</mark>"}
"""HTML of a difference by its kind (`difflib.SequenceMatcher.get_opcodes`)."""


class Answer(NamedTuple):
    """An answer that differs from PyTorch's, and the variants that gave it."""

    names: list[str]
    text: Markup  # With differences marked.
    grade: str


class ShownExample(NamedTuple):
    """An example as the page shows it."""

    record: dict[str, Any]  # Entry of examples.json, with PyTorch's answer.
    language: str  # Language tag of prompt and answers; empty where unknown.
    messages: list[tuple[str, str]]  # (role, text)
    grade: str  # Grade of PyTorch's answer.
    same: list[str]  # Variants whose answer equals PyTorch's.
    others: list[Answer]
    as_called: list[Answer]  # Other answers of a plain call of the engine.


class EmbeddedImage(NamedTuple):
    """An image as a data URI, with its size in pixels and its id on the page."""

    id: str
    uri: str
    width: int
    height: int


def mark_differences(reference: str, answer: str) -> Markup:
    """Return `answer` as HTML: <mark> around text that `reference` lacks, <del> around text that only it has."""
    one, other, html = TOKEN.findall(reference), TOKEN.findall(answer), Markup("")
    for kind, start, end, other_start, other_end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        tokens = one[start:end] if kind == "delete" else other[other_start:other_end]
        html += Markup(MARKS[kind]).format("".join(tokens))
    return html


def grade(score: float | None) -> str:
    """Return "correct", "wrong", a share for a partly correct answer, or "" for an unlabelled example."""
    if score is None or pd.isna(score):
        return ""
    return {0.0: "wrong", 1.0: "correct"}.get(float(score), f"{100 * score:.0f} % correct")


def message_texts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (role, text) of each message of an example; images are left out."""
    messages = record["messages"]
    return [(m["role"], " ".join(part.get("text", "") for part in content_parts(m)).strip()) for m in messages]


def _other_answers(reference: str, rows: dict[str, pd.Series], column: str) -> list[Answer]:
    """Group the answers in a column that differ from `reference`; `rows` is by variant."""
    others: dict[str, Answer] = {}
    for name, row in rows.items():
        text, score = row[column], row["score" if column == "answer" else f"{column}_score"]
        if isinstance(text, str) and text != reference:
            first = Answer([], mark_differences(reference, text), grade(score))
            others.setdefault(text, first).names.append(name)
    return list(others.values())


def choose_examples(golden: Golden, answers: dict[str, pd.DataFrame]) -> list[ShownExample]:
    """Return at most MAX_EXAMPLES examples, those with the most differing variants first; `answers` is by variant."""
    by_id = {name: frame.set_index("id") for name, frame in answers.items()}
    counts = Counter(message for record in golden.records for message in set(message_texts(record)))
    # A system prompt of most examples distinguishes none of them.
    common = {text for text, count in counts.items() if text[0] == "system" and count > len(golden.records) / 2}
    shown = []
    for record in golden.records:
        rows = {name: frame.loc[record["id"]] for name, frame in by_id.items()}
        language = record["language"] if LANGUAGE.fullmatch(record["language"]) else ""
        *before, last = message_texts(record)
        messages = [*(message for message in before if message not in common), last]
        same = [name for name, row in rows.items() if row["answer"] == record["answer"]]
        others, as_called = (_other_answers(record["answer"], rows, column) for column in ("answer", "as_called"))
        graded = grade(next(iter(rows.values()), {}).get("reference_score"))
        shown.append(ShownExample(record, language, messages, graded, same, others, as_called))
    shown.sort(key=lambda example: -sum(len(answer.names) for answer in example.others))
    return shown[:MAX_EXAMPLES]


def embed_images(golden: Golden, examples: list[ShownExample]) -> dict[str, EmbeddedImage]:
    """Return each image of `examples` once, by file name, as PNG or JPEG, whichever is smaller."""
    images: dict[str, EmbeddedImage] = {}
    for name in dict.fromkeys(name for example in examples for name in example.record["images"]):
        image = Image.fromarray(golden.image(name).original)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        encoded = []
        for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
            buffer = io.BytesIO()
            image.save(buffer, format=kind, **options)
            encoded.append((buffer.tell(), f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"))
        images[name] = EmbeddedImage(f"image-{len(images)}", min(encoded)[1], *image.size)
    return images
