"""Files as somebody makes them who means harm, and what a parser may do with one: give a value, or a sentence.

Most are whole files with something changed, for a parser refuses noise at its first byte.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from hf2mnn.core.errors import LONGEST, Hf2mnnError

SECONDS = 3.0
"""Of this thread's own time, for a file of a few kilobytes: a collection of garbage with transformers loaded may take
one."""


def cases(short: int = 25, long: int = 7500) -> settings:
    """How many files a test tries: the same ones each time in `make test`, others in each `make fuzz`."""
    chosen = settings.get_current_profile_name() == "long"  # which pytest knows when it reads the tests
    return settings(max_examples=long if chosen else short, derandomize=not chosen, deadline=None, database=None)


@dataclass
class Tally:
    """What all tests together have tried."""

    cases: int = 0
    refused: int = 0
    slowest: float = 0.0


TALLY = Tally()


def survive(parse: Callable[..., Any], *arguments: Any) -> None:
    """Fails where a parser neither gives a value nor refuses in one line that a terminal only shows, or takes long."""
    begun = time.thread_time()
    try:
        parse(*arguments)
    except Hf2mnnError as error:
        sentence = str(error)
        assert sentence.isprintable()
        assert len(sentence) <= 6 * LONGEST
        TALLY.refused += 1
    spent = time.thread_time() - begun
    TALLY.cases, TALLY.slowest = TALLY.cases + 1, max(TALLY.slowest, spent)
    assert spent < SECONDS


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if depth % 2 else [value]
    return value


VALUES = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2, 7, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 62, 1 << 64, 10**40]),
    st.sampled_from([0.5, 1.0, -0.0, 1e-320, 1e38, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J\n", "é" * 40000, "model", "1"]),
    st.sampled_from([[], {}, [[]], [1], ["a"], {"a": {}}, {"type": "x"}, nested(40), nested(71)]),
    st.integers(),
    st.text(max_size=6),
).map(copy.deepcopy)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON value with a few of its parts taken out or replaced."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        part = made
        while isinstance(part, dict | list) and part:
            keys = sorted(part) if isinstance(part, dict) else range(len(part))
            key = keys[draw(st.integers(0, len(keys) - 1))]
            if not isinstance(part[key], dict | list) or not part[key] or draw(st.integers(0, 3)) == 0:
                if draw(st.booleans()):
                    part[key] = draw(VALUES)
                else:
                    del part[key]
                break
            part = part[key]
    return made


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut short, overwritten, or with others put in."""
    place = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(("cut", "over", "in", "cut", "numbers"))):
        case "cut":
            return content[:place]
        case "over":
            put = draw(st.binary(min_size=1, max_size=4))
            return content[:place] + put + content[place + len(put) :]
        case "in":
            return content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:]
        case _:
            put = draw(st.sampled_from([b"\0" * 8, b"\xff" * 4, b"\xff" * 8, b"\x7f" * 4, b"\0\0\0\x80"]))
            return content[:place] + put + content[place + len(put) :]


@st.composite
def json_files(draw: st.DrawFn, document: Any) -> bytes:
    """The bytes of a JSON file that once held `document`."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
    if kind == 1:
        return draw(damaged(json.dumps(document).encode()))
    text = json.dumps(draw(changed(document)))
    if kind == 2 and text.startswith('{"'):  # a key that is there twice
        text = text[:-1] + ", " + text[1 : text.index(":")] + ": 1}"
    return text.encode()
