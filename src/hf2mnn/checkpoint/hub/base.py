"""The files of a pinned revision: those that are here already if they are the right ones, the others from its hub.

What both hubs have in common stands here; how each is spoken to, in `huggingface` and `modelscope`, through their own
clients.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from hf2mnn.checkpoint.folder import FILES
from hf2mnn.checkpoint.hub.pin import Pin, check_names
from hf2mnn.checkpoint.room import check_disk
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.progress import BYTES, Progress, progress

WAITS = (2.0, 8.0)
"""Seconds before the second and the third try of what may pass."""
LONGEST_WAIT = 60.0
"""Seconds that a hub may ask to wait; for more, a person is told."""
AGAIN = "run the same command again to resume"
BY_HAND = "or put the files in place by hand (--files)"

Result = TypeVar("Result")


class TransientError(CheckpointError):
    """May be gone at the next try: no connection, a cut line, a hub that is down or asks to wait (`wait`, seconds).
    `at_once`: a person should know now, for it seldom passes in seconds.
    """

    def __init__(self, sentence: str, wait: float = 0, at_once: bool = False) -> None:
        super().__init__(sentence)
        self.wait, self.at_once = wait, at_once


class CorruptedError(CheckpointError):
    """A file has come whole, and is not the one that the hub lists."""


class Hub(Protocol):
    """A hub through its client. Methods raise CheckpointError; TransientError where another try may help."""

    default: str
    """The branch that is taken where none is named."""
    package: str
    """The client."""

    @property
    def cache(self) -> Path:
        """Folder in which the client keeps what it has downloaded."""

    def find(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin:
        """What a revision holds now of files whose names fit one of the patterns."""

    def remembered(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin | None:
        """What a revision held when it was downloaded, without a network; None where that is not known."""

    def cached(self, pin: Pin, name: str) -> Path | None:
        """A file of an earlier download, unchecked."""

    def part(self, pin: Pin, name: str) -> Path:
        """Where the first bytes of a file are that is not here as a whole."""

    def download(self, pin: Pin, name: str, shown: Position) -> Path:
        """Go on with a file from the bytes that are here, check it, and put it into the cache.

        Raises:
            CorruptedError: it is not the pinned file; nothing of it is kept.
        """


class Position:
    """How far a file has come, for a progress that counts."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._at = shown, 0

    def at(self, position: int) -> None:
        """`position` bytes of the file are here; fewer than before where it began again."""
        self._shown.update(position - self._at)
        self._at = position


def hub_named(name: str) -> Hub:
    """The hub of a configuration's or a pin's name.

    Raises:
        CheckpointError: there is no such hub.
    """
    if name == "huggingface":
        from hf2mnn.checkpoint.hub.huggingface import HuggingFace

        return HuggingFace()
    if name == "modelscope":
        from hf2mnn.checkpoint.hub.modelscope import ModelScope

        return ModelScope()
    raise CheckpointError(f"there is no hub {name!r}; these are: huggingface, modelscope")


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def persist(act: Callable[[], Result]) -> Result:
    """Try again what may pass, with a wait before each try."""
    for wait in WAITS:
        try:
            return act()
        except TransientError as error:
            wait = max(wait, error.wait)
            if error.at_once or wait > LONGEST_WAIT:
                raise
            say(f"{error}; trying again in {wait:.0f} s")
        time.sleep(wait)
    return act()


def pin_repository(
    repository: str, revision: str | None = None, hub: str = "huggingface", patterns: Sequence[str] = FILES
) -> Pin:
    """The commit that a branch or tag is now, with the files that stages read; `revision` None is the default branch.
    Where the hub cannot be reached, it is by what was downloaded before.

    Raises:
        CheckpointError: the hub has no such repository or revision, wants a login, or cannot be reached.
    """
    asked = hub_named(hub)
    revision = asked.default if revision is None else revision
    check_names(repository, revision)
    try:
        return persist(lambda: asked.find(repository, revision, patterns))
    except TransientError as error:
        pin = asked.remembered(repository, revision, patterns)
        if pin is None:
            raise
        say(f"{error}; taking what was downloaded before, commit {pin.revision}")
        return pin


def _by_hand(folder: Path, pin: Pin) -> dict[str, Path]:
    """Files of a folder that are the pinned ones; of each other one of the same name it is said."""
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder} with files put in place by hand; make it, or leave --files out"
        )
    found = {}
    for name, digest in pin.files.items():
        path = folder / name
        if path.is_file():
            fault = digest.fault(path, name)
            if fault is None:
                found[name] = path
            else:
                say(f"{path} is not taken: it has {fault} in {pin.repository} at {pin.revision}")
    return found


def _cached(hub: Hub, pin: Pin, name: str) -> Path | None:
    """A file of the cache if it is the pinned one; another is removed there."""
    path = hub.cached(pin, name)
    fault = pin.files[name].fault(path, name) if path else None
    if fault is None:
        return path
    say(f"{path} is removed from the cache: it has {fault}")
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    return None


def _fetch(hub: Hub, pin: Pin, name: str) -> Path:
    def once() -> Path:
        with progress(f"fetching {name}", pin.files[name].size, BYTES) as shown:
            position = Position(shown)
            try:
                return persist(lambda: hub.download(pin, name, position))
            except OSError as error:
                raise CheckpointError(
                    f"{name} cannot be written to {hub.cache} ({error.strerror or error}): make space or change its"
                    f" permissions, and {AGAIN}"
                ) from None

    try:
        return once()
    except CorruptedError as error:
        say(f"{error}; fetching it once more")
    try:
        return once()
    except CorruptedError as error:
        raise CheckpointError(
            f"{error}, twice: the hub or what lies between (a mirror, a proxy) gives another file; try another way to"
            f" the hub, {BY_HAND}"
        ) from None


def gather(hub: Hub, pin: Pin, files: Path | None = None) -> dict[str, Path]:
    """Every pinned file, each checked: from the folder `files` that a person has filled, from the cache, from the hub.

    Raises:
        CheckpointError: a file cannot be had, or there is no room for it.
    """
    found = _by_hand(Path(files), pin) if files else {}
    for name in pin.files:
        if name not in found and (path := _cached(hub, pin, name)):
            found[name] = path
    # The small ones first: whoever looks into the cache sees early what it is.
    missing = sorted((name for name in pin.files if name not in found), key=lambda name: pin.files[name].size)
    left = 0
    for name in missing:
        part = hub.part(pin, name)
        left += pin.files[name].size - (part.stat().st_size if part.exists() else 0)
    check_disk(hub.cache, max(left, 0), f"what is still to download of {pin.repository}")
    return found | {name: _fetch(hub, pin, name) for name in missing}
