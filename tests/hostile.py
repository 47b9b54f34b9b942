"""Strategies for hostile files, and the contract of a parser: return a value or raise a one-line Hf2mnnError.

Most files are valid ones with some parts changed, because a parser refuses noise at its first byte.
"""

from __future__ import annotations

import copy
import json
from _lsprof import Profiler  # the C core of cProfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from hf2mnn.core.errors import MAX_MESSAGE, Hf2mnnError

MAX_CALLS = 2_000_000
"""Largest number of function calls for one file. Three long strings (below) in YAML, the worst case, need half."""


def cases(short: int = 10, long: int = 7500) -> settings:
    """Return settings for `short` fixed files per test in `make test`, and `long` random ones in `make fuzz`."""
    fuzz = settings.get_current_profile_name() == "long"  # known when pytest imports the tests
    return settings(max_examples=long if fuzz else short, deadline=None, database=None)


@dataclass
class Tally:
    """Totals of all tests."""

    cases: int = 0
    refused: int = 0
    most_calls: int = 0


TALLY = Tally()


def survive(parse: Callable[..., Any], *arguments: Any) -> None:
    """Check that a parser returns or raises a printable one-line error, within `MAX_CALLS` function calls."""
    profiler = Profiler()
    profiler.enable(subcalls=False, builtins=True)
    try:
        parse(*arguments)
    except Hf2mnnError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) <= 6 * MAX_MESSAGE
        TALLY.refused += 1
    finally:
        profiler.disable()
    calls = sum(entry.callcount for entry in profiler.getstats())
    TALLY.cases, TALLY.most_calls = TALLY.cases + 1, max(TALLY.most_calls, calls)
    assert calls < MAX_CALLS


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if depth % 2 else [value]
    return value


VALUES = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2, 7, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 62, 1 << 64, 10**40]),
    st.sampled_from([0.5, 1.0, -0.0, 1e-320, 1e38, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J\n", "é" * 10000, "model", "1"]),
    st.sampled_from([[], {}, [[]], [1], ["a"], {"a": {}}, {"type": "x"}, nested(40), nested(71)]),
    st.integers(),
    st.text(max_size=6),
).map(copy.deepcopy)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Draw a JSON value with one to three parts removed or replaced."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        part = result
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
    return result


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw bytes that are truncated, overwritten, or have others inserted."""
    position = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(("truncate", "overwrite", "insert", "truncate", "numbers"))):
        case "truncate":
            return content[:position]
        case "overwrite":
            patch = draw(st.binary(min_size=1, max_size=4))
            return content[:position] + patch + content[position + len(patch) :]
        case "insert":
            return content[:position] + draw(st.binary(min_size=1, max_size=16)) + content[position:]
        case _:
            patch = draw(st.sampled_from([b"\0" * 8, b"\xff" * 4, b"\xff" * 8, b"\x7f" * 4, b"\0\0\0\x80"]))
            return content[:position] + patch + content[position + len(patch) :]


@st.composite
def json_files(draw: st.DrawFn, document: Any) -> bytes:
    """Draw the bytes of a damaged JSON file of `document`."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
    if kind == 1:
        return draw(damaged(json.dumps(document).encode()))
    text = json.dumps(draw(changed(document)))
    if kind == 2 and text.startswith('{"'):  # a duplicate key
        text = text[:-1] + ", " + text[1 : text.index(":")] + ": 1}"
    return text.encode()
