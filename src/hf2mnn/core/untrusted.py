"""Files of strangers, read so that none of them can do more than be refused.

What is wrong is a ValueError here; who reads a file makes it one of `errors`, for it knows what the file should be.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 26
"""Of a JSON file; the largest tokenizers take half of it. As Python's objects it becomes some twenty times that."""
DEPTH = 64
"""Lists and objects within each other."""
MOST_PARTS = 1 << 22
"""Lists and objects equally deep."""
LONGEST_NAME, LONGEST_PATH = 255, 1024
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""What a hub's cache calls a file."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The whole of a file of at most `most` bytes.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is larger, or no file (a pipe would be waited for, a device read for ever).
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size} bytes, more than {most}")
        return file.read(size)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice, one program takes the first value and another the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text[:40]}")
    return number


def check_shape(value: Any, most: int = MOST_PARTS) -> None:
    """Raises ValueError where lists and mappings lie deeper within each other than `DEPTH`, or more than `most` side by
    side: YAML's aliases can ask for any number with a few bytes.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        parts = (part for parent in level for part in (parent.values() if isinstance(parent, dict) else parent))
        level = list(islice((part for part in parts if isinstance(part, dict | list)), most + 1))
        if not level:
            return
        if len(level) > most:
            raise ValueError(f"it has more than {most} lists and objects")
    if level:
        raise ValueError(f"it is nested more than {DEPTH} deep")


def parse_json(content: bytes | str, finite: bool = True) -> Any:
    """What a JSON text says; NaN and infinities only where they need not be `finite`.

    Raises:
        ValueError: it is not JSON, has a key twice, or is nested deeper than any honest file.
    """
    kinds = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(content, object_pairs_hook=_once, **kinds)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEPTH} deep") from None
    check_shape(value)
    return value


def read_json(path: Path, finite: bool = True) -> Any:
    """As `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path), finite)


def inside(folder: Path, name: Any) -> Path:
    """The path of what a stranger's file calls `name`, which must be in `folder`.

    Names lead nowhere else; a symbolic link may lead to what has its own name (files that a person has put together)
    or is called by its hash (a hub's cache), for a repository can bring links, but no such file of anybody's.

    Raises:
        ValueError: it would lead elsewhere.
    """
    if not isinstance(name, str) or not name or any(ord(letter) < 32 or letter == "\\" for letter in name):
        raise ValueError(f"{str(name)[:80]!r} is no file name")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name[:80]!r} leads out of the folder")
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeError:
        longest = LONGEST_NAME + 1
    if longest > LONGEST_NAME or len(name) > LONGEST_PATH:
        raise ValueError(f"{name[:80]!r} is no file name")
    here = folder
    for part in path.parts:
        here = here / part
        if here.is_symlink():
            _check_link(folder, here)
    return here


def _check_link(folder: Path, link: Path) -> None:
    root, target = os.path.realpath(folder), Path(os.path.realpath(link))
    if target.name == link.name or (target.parent.name == "blobs" and BLOB.fullmatch(target.name)):
        return
    if target.is_relative_to(root) and not any(part.startswith(".") for part in target.relative_to(root).parts):
        return
    raise ValueError(f"{link.name!r} is a link to {target}, a file of another name out of the folder")


TEMPLATE_SECONDS = 10.0
"""Of a chat template. Honest ones take milliseconds."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block of Python code that takes longer. Only the main thread can be interrupted; in
    others the block takes its time.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
