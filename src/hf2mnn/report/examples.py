"""Examples of the report: prompts, images and answers, with differences from PyTorch's answer marked."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from PIL import Image

from hf2mnn.reference.examples import content_parts
from hf2mnn.reference.golden import Golden

MAX_EXAMPLES = 40
"""Examples on the page at most; those with differences come first."""
MAX_SIDE = 512
"""Longest side of an embedded image in pixels."""
LANGUAGE = re.compile(r"(?!any$)[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{CJK}]|[^\W{CJK}]+|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """An answer that differs from PyTorch's, and the variants that gave it."""

    names: list[str]
    text: Markup  # With differences marked.
    grade: str


@dataclass(frozen=True)
class ShownExample:
    """An example as the page shows it."""

    id: str
    category: str
    language: str  # Language tag of prompt and answers; empty where unknown.
    messages: list[tuple[str, str]]  # (role, text)
    images: list[str]  # File names.
    expected: list[str]  # Correct answers; empty for an unlabelled example.
    reference: str  # PyTorch's answer.
    grade: str  # Grade of PyTorch's answer.
    same: list[str]  # Variants whose answer equals PyTorch's.
    others: list[Answer]
    as_called: list[Answer]  # Other answers of a plain call of the engine.


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a data URI, with its size in pixels and its id on the page."""

    id: str
    uri: str
    width: int
    height: int


def split_tokens(text: str) -> list[str]:
    """Split text into words, runs of white space, punctuation, and single CJK characters."""
    return TOKEN.findall(text)


def mark_differences(reference: str, answer: str) -> Markup:
    """Return `answer` as HTML: <mark> around text that `reference` lacks, <del> around text that only it has."""
    one, other, html = split_tokens(reference), split_tokens(answer), []
    for kind, start, end, other_start, other_end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        inserted, deleted = escape("".join(other[other_start:other_end])), escape("".join(one[start:end]))
        if kind == "equal":
            html.append(inserted)
        elif kind == "delete":
            html.append(Markup("<del>{}</del>").format(deleted))
        else:
            html.append(Markup("<mark>{}</mark>").format(inserted))
    return Markup("").join(html)


def grade(score: float | None) -> str:
    """Return "correct", "wrong", a share for a partly correct answer, or "" for an unlabelled example."""
    if score is None or pd.isna(score):
        return ""
    return {0.0: "wrong", 1.0: "correct"}.get(float(score), f"{100 * score:.0f} % correct")


def message_texts(record: dict) -> list[tuple[str, str]]:
    """Return (role, text) of each message of an example; images are left out."""
    return [
        (message["role"], " ".join(part.get("text", "") for part in content_parts(message)).strip())
        for message in record["messages"]
    ]


def _other_answers(reference: str, answers: list[tuple[str, str, float | None]]) -> list[Answer]:
    """Group the answers that differ from `reference`; `answers` holds (variant, text, score)."""
    others: dict[str, Answer] = {}
    for name, text, score in answers:
        if text != reference:
            first = Answer([], mark_differences(reference, text), grade(score))
            others.setdefault(text, first).names.append(name)
    return list(others.values())


def _shown_example(record: dict, rows: dict[str, pd.Series], common: set[tuple[str, str]]) -> ShownExample:
    reference = record["answer"]
    answers = [(name, row["answer"], row["score"]) for name, row in rows.items()]
    as_called = [(name, row["as_called"], row["as_called_score"]) for name, row in rows.items()]
    messages = message_texts(record)
    first = next(iter(rows.values()), {})
    return ShownExample(
        id=record["id"],
        category=record["category"],
        language=record["language"] if LANGUAGE.fullmatch(record["language"]) else "",
        messages=[message for message in messages if message not in common or message is messages[-1]],
        images=record["images"],
        expected=list(dict.fromkeys(record["expected"] or [])),
        reference=reference,
        grade=grade(first.get("reference_score")),
        same=[name for name, text, _ in answers if text == reference],
        others=_other_answers(reference, answers),
        as_called=_other_answers(reference, [answer for answer in as_called if isinstance(answer[1], str)]),
    )


def choose_examples(golden: Golden, answers: dict[str, pd.DataFrame]) -> list[ShownExample]:
    """Return at most MAX_EXAMPLES examples, those with the most differing variants first; `answers` is by variant."""
    by_id = {name: frame.set_index("id") for name, frame in answers.items()}
    counts = Counter(message for record in golden.records for message in set(message_texts(record)))
    # A system prompt of most examples distinguishes none of them.
    most = len(golden.records) / 2
    common = {message for message, count in counts.items() if message[0] == "system" and count > most}
    shown = [
        _shown_example(record, {name: frame.loc[record["id"]] for name, frame in by_id.items()}, common)
        for record in golden.records
    ]
    shown.sort(key=lambda example: -sum(len(answer.names) for answer in example.others))
    return shown[:MAX_EXAMPLES]


def _embed(pixels: np.ndarray, identifier: str) -> EmbeddedImage:
    """Encode uint8 RGB [height, width, 3] as PNG or JPEG, whichever is smaller."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        encoded.append((buffer.tell(), f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"))
    return EmbeddedImage(identifier, min(encoded)[1], *image.size)


def embed_images(golden: Golden, examples: list[ShownExample]) -> dict[str, EmbeddedImage]:
    """Return each image of `examples` once, by file name."""
    names = dict.fromkeys(name for example in examples for name in example.images)
    return {name: _embed(golden.image(name).original, f"image-{index}") for index, name in enumerate(names)}
