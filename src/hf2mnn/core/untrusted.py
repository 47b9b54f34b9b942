"""Reading of untrusted files: every input is either parsed within bounds or refused.

Functions here raise ValueError with a message that begins with "it"; the reader of a format turns it into a typed
error, because it knows what the file should be.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

MAX_BYTES = 1 << 26
"""Size of a JSON file; the largest tokenizers have half of it. As Python objects it takes about twenty times that."""
MAX_DEPTH = 64  # nesting of lists and objects
MAX_CONTAINERS = 1 << 22  # lists and objects at one depth
MAX_NAME, MAX_PATH = 255, 1024  # bytes of a file name, and characters of a path
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # name of a file in a hub's cache: its hash
TEMPLATE_SECONDS = 10.0  # time limit of a chat template; valid ones take milliseconds
JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
JSON_TOKEN = re.compile(rf"(?P<key>{JSON_STRING.pattern})(?=\s*:)|{JSON_STRING.pattern}|[\[{{\]}}]", re.DOTALL)
BRACKET = re.compile(r"[\[{\]}]")
TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Return the contents of a file of at most `limit` bytes; refuse pipes, which block, and endless devices."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, more than {limit}")
        return file.read(size)


def check_nesting(text: str) -> None:
    """Refuse deeply nested JSON before a recursive parser reads it, in one pass over the brackets outside strings."""
    depth = 0
    for match in BRACKET.finditer(JSON_STRING.sub("", text)):
        depth += 1 if match[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)


def check_shape(value: Any, limit: int = MAX_CONTAINERS) -> None:
    """Refuse containers nested too deep, or more than `limit` at one depth; YAML's aliases can make very many."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        parts = (part for parent in level for part in (parent.values() if isinstance(parent, dict) else parent))
        level = list(islice((part for part in parts if isinstance(part, dict | list)), limit + 1))
        if not level:
            return
        if len(level) > limit:
            raise ValueError(f"it has more than {limit} lists and objects")
    if level:
        raise ValueError(TOO_DEEP)


def _refuse_duplicates(keys: Iterable[tuple[str, int]]) -> None:
    """Refuse equal keys of an object, given with their lines: programs take either the first or the last value."""
    lines: dict[str, int] = {}
    for key, line in keys:
        if key in lines:
            both = f"line {line}" if line == lines[key] else f"lines {lines[key]} and {line}"
            raise ValueError(f"it has the key {key[:80]!r} twice, in {both}: remove one of them")
        lines[key] = line


def _refuse_duplicates_in(text: str) -> None:
    """Refuse the first duplicate key in JSON that is valid up to the end of its object."""
    line, start, objects = 1, 0, []
    for match in JSON_TOKEN.finditer(text):
        line, start = line + text.count("\n", start, match.start()), match.start()
        if match[0] in "{[":
            objects.append([])
        elif match[0] in "}]":
            _refuse_duplicates(objects.pop())
        elif match["key"]:
            objects[-1].append((json.loads(match["key"]), line))


class _Loader(yaml.SafeLoader):
    """Loader of YAML with safe tags that refuses duplicate keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # Here and not in a constructor, since keys that "<<" merges are no duplicates.
        named = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        _refuse_duplicates((key.value, key.start_mark.line + 1) for key in named)
        return node


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text[:40]}")
    return number


def parse_json(content: bytes | str, finite: bool = True) -> Any:
    """Parse JSON without duplicate keys, and unless `finite` is False without NaN and infinities."""
    text = content if isinstance(content, str) else content.decode(json.detect_encoding(content), "surrogatepass")
    check_nesting(text)
    kinds = {"parse_constant": _finite, "parse_float": _finite} if finite else {}

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            _refuse_duplicates_in(text)
        return value

    value = json.loads(text, object_pairs_hook=unique_keys, **kinds)
    check_shape(value)
    return value


def parse_yaml(content: bytes, limit: int = MAX_CONTAINERS) -> Any:
    """Parse YAML in UTF-8 with safe tags only, and at most `limit` lists and mappings at one depth."""
    text, depth = content.decode(), 0
    try:
        # The parser of events is iterative, the composer of values recursive.
        for event in yaml.parse(text, _Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(TOO_DEEP)
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, AttributeError) as error:  # AttributeError: an invalid tag
        message = str(error).replace('in "<unicode string>", ', "at ")
        if isinstance(error, ReaderError):
            before = text[: error.position].split("\n")
            message = f"{error.reason} at line {len(before)}, column {len(before[-1]) + 1}"
        raise ValueError(" ".join(message.split()).replace(" ^", ";").rstrip(";")) from None
    check_shape(value, limit)
    return value


def read_json(path: Path, finite: bool = True) -> Any:
    """Read a JSON file; see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path), finite)


def path_inside(folder: Path, name: Any) -> Path:
    """Return the path of a file that an untrusted file names, which must be in `folder`.

    Symbolic links may lead out of the folder only to a file of the same name (a user's own links) or to a blob of a
    hub's cache: a repository can contain links, but not to a file with the name of its hash.
    """
    if not isinstance(name, str) or not name or any(ord(character) < 32 or character == "\\" for character in name):
        raise ValueError(f"{str(name)[:80]!r} is not a file name")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name[:80]!r} leads out of the folder")
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeError:
        longest = MAX_NAME + 1
    if longest > MAX_NAME or len(name) > MAX_PATH:
        raise ValueError(f"{name[:80]!r} is not a file name")
    current = folder
    for part in path.parts:
        current = current / part
        if current.is_symlink():
            _check_link(folder, current)
    return current


def _check_link(folder: Path, link: Path) -> None:
    root, target = os.path.realpath(folder), Path(os.path.realpath(link))
    if target.name == link.name or (target.parent.name == "blobs" and BLOB.fullmatch(target.name)):
        return
    if target.is_relative_to(root) and not any(part.startswith(".") for part in target.relative_to(root).parts):
        return
    raise ValueError(f"{link.name!r} is a link to {target}, a file of another name outside of the folder")


@contextmanager
def time_limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block of Python code that takes longer; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
