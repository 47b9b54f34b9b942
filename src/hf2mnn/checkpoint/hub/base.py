"""Interface of a hub, its errors, and retries; `huggingface` and `modelscope` implement it with the hubs' clients."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from hf2mnn.checkpoint.folder import FILES
from hf2mnn.checkpoint.hub.pin import Pin
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.progress import Progress

WAITS = (2.0, 8.0)
"""Seconds before the second and the third attempt."""
MAX_WAIT = 60.0
"""Longest wait in seconds that a hub may request; a longer one is reported at once."""
RESUME = "run the same command again to resume"
USE_FILES = "or provide the files in a folder (--files)"

Result = TypeVar("Result")


class TransientError(CheckpointError):
    """Failure that another attempt may not have: no connection, an interrupted one, a hub that is down or busy.

    Attributes:
        wait: Seconds to wait that the hub requests.
        report_now: True for a failure that rarely ends within seconds, so that it is not retried.
    """

    def __init__(self, message: str, wait: float = 0, report_now: bool = False) -> None:
        super().__init__(message)
        self.wait, self.report_now = wait, report_now


class CorruptedError(CheckpointError):
    """A complete file differs from the one that the hub lists."""


class Hub(Protocol):
    """A hub. Methods raise CheckpointError; TransientError where another attempt may succeed.

    Attributes:
        default: Default branch.
        package: Package of the client.
    """

    default: str
    package: str

    @property
    def cache(self) -> Path:
        """Download folder of the client."""

    def find(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin:
        """Return the current commit of a revision, with its files that match a pattern."""

    def find_offline(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin | None:
        """Return the commit of the last download of a revision, without network access; None if unknown."""

    def cached(self, pin: Pin, name: str) -> Path | None:
        """Return an earlier download of a file, unchecked."""

    def part(self, pin: Pin, name: str) -> Path:
        """Return the path of an incomplete download."""

    def download(self, pin: Pin, name: str, position: Position) -> Path:
        """Download a file into the cache, resuming an incomplete download, and check it.

        Raises:
            CorruptedError: It differs from the pinned file; nothing is kept.
        """


class Position:
    """Position in a download, for a progress bar that only counts up from the last update."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._position = bar, 0

    def set(self, position: int) -> None:
        """Set the number of bytes on disk; it falls when a download starts again."""
        self._bar.update(position - self._position)
        self._position = position


def warn(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)


def retry(act: Callable[[], Result]) -> Result:
    """Call `act` until it raises no TransientError, at most three times, and wait before each new attempt."""
    for wait in WAITS:
        try:
            return act()
        except TransientError as error:
            wait = max(wait, error.wait)
            if error.report_now or wait > MAX_WAIT:
                raise
            warn(f"{error}; next attempt in {wait:.0f} s")
        time.sleep(wait)
    return act()
