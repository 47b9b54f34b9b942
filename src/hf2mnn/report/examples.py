"""The examples that the report shows: those on which conversions differ first, with their images."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from hf2mnn.reference.examples import parts_of
from hf2mnn.reference.golden import Golden
from hf2mnn.report.differences import marked

SHOWN = 40
"""Examples shown at most, those with a difference first."""
SIDE = 512
"""Longest side of an image in pixels."""
LANGUAGE = re.compile(r"(?!any$)[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


@dataclass(frozen=True)
class Said:
    """An answer that the conversions `names` gave; `grade` says whether it is right, where there is a right one."""

    names: list[str]
    text: Markup
    grade: str


@dataclass(frozen=True)
class Example:
    """`same` are the conversions with PyTorch's answer, `others` the other answers; `called` those of a plain call
    that are not PyTorch's.
    """

    id: str
    category: str
    language: str
    turns: list[tuple[str, str]]
    images: list[str]
    expected: list[str]
    reference: str
    grade: str
    same: list[str]
    others: list[Said]
    called: list[Said]


@dataclass(frozen=True)
class EmbeddedImage:
    id: str
    uri: str
    width: int
    height: int


def grade(score: float | None) -> str:
    """ "right", "wrong", a share for a partly right answer, or nothing where no answer is right or wrong."""
    if score is None or pd.isna(score):
        return ""
    return {0.0: "wrong", 1.0: "right"}.get(float(score), f"{100 * score:.0f} % right")


def turns_of(record: dict) -> list[tuple[str, str]]:
    """(role, text) of each message of an example, without its images."""
    texts = [" ".join(part.get("text", "") for part in parts_of(message)) for message in record["messages"]]
    return [(message["role"], text.strip()) for message, text in zip(record["messages"], texts, strict=True)]


def _grouped(reference: str, given: list[tuple[str, str, float | None]]) -> list[Said]:
    """The answers that are not PyTorch's, each with all that gave it, in their order."""
    groups: dict[str, list[str]] = {}
    scores = {}
    for name, text, score in given:
        if text != reference:
            groups.setdefault(text, []).append(name)
            scores[text] = score
    return [Said(names, marked(reference, text), grade(scores[text])) for text, names in groups.items()]


def _example(record: dict, rows: dict[str, pd.Series], usual: set[tuple[str, str]]) -> Example:
    reference = record["answer"]
    given = [(name, row["answer"], row["score"]) for name, row in rows.items()]
    called = [(name, row["as_called"], row["as_called_score"]) for name, row in rows.items()]
    turns = turns_of(record)
    first = next(iter(rows.values()), {})
    return Example(
        id=record["id"],
        category=record["category"],
        language=record["language"] if LANGUAGE.fullmatch(record["language"]) else "",
        turns=[turn for turn in turns if turn not in usual or turn is turns[-1]],
        images=record["images"],
        expected=list(dict.fromkeys(record["expected"] or [])),
        reference=reference,
        grade=grade(first.get("reference_score")),
        same=[name for name, text, _ in given if text == reference],
        others=_grouped(reference, given),
        called=_grouped(reference, [said for said in called if isinstance(said[1], str)]),
    )


def choose(golden: Golden, answers: dict[str, pd.DataFrame]) -> list[Example]:
    """At most SHOWN, those that most conversions answer otherwise than PyTorch first. `answers` by conversion."""
    by_id = {name: frame.set_index("id") for name, frame in answers.items()}
    counts = Counter(turn for record in golden.records for turn in set(turns_of(record)))
    # What most prompts say (a system prompt) tells nothing about one of them.
    usual = {turn for turn, count in counts.items() if turn[0] == "system" and 2 * count > len(golden.records)}
    made = [
        _example(record, {name: frame.loc[record["id"]] for name, frame in by_id.items()}, usual)
        for record in golden.records
    ]
    made.sort(key=lambda example: -sum(len(said.names) for said in example.others))
    return made[:SHOWN]


def _data_uri(pixels: np.ndarray) -> tuple[str, tuple[int, int]]:
    """A data URI, as PNG or JPEG, whichever is smaller, and the image's size."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    made = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        made.append((buffer.tell(), f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"))
    return min(made)[1], image.size


def images_of(golden: Golden, examples: list[Example]) -> dict[str, EmbeddedImage]:
    """Each image of `examples` once, by name."""
    images = {}
    for name in dict.fromkeys(name for example in examples for name in example.images):
        uri, (width, height) = _data_uri(golden.image(name).original)
        images[name] = EmbeddedImage(f"image-{len(images)}", uri, width, height)
    return images
