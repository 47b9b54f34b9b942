"""Interface of a hub, its errors, and retries; `huggingface` and `modelscope` implement it with the hubs' clients."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.hub.pin import Pin
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.progress import Progress

WAITS = (2.0, 8.0)  # seconds before the second and the third attempt
MAX_WAIT = 60.0  # longest wait in seconds that a hub may request; a longer one is reported at once
RESUME = "run the same command again to resume"
USE_FILES = "or provide the files in a folder (--files)"


class TransientError(CheckpointError):
    """Failure that another attempt may not have: no connection, an interrupted one, a hub that is down or busy.

    `wait` is in seconds. `report_now` is set for a failure that rarely ends within seconds: it is not retried.
    """

    def __init__(self, message: str, wait: float = 0, report_now: bool = False) -> None:
        super().__init__(message)
        self.wait, self.report_now = wait, report_now


class CorruptedError(CheckpointError):
    """A complete file differs from the one that the hub lists."""


class Hub(ABC):
    """A hub. Methods raise CheckpointError; TransientError where another attempt may succeed."""

    default: str  # default branch
    package: str  # package of the client
    cache: Path  # download folder of the client
    part_suffix = ".incomplete"  # of incomplete downloads

    @abstractmethod
    def find(self, repository: str, revision: str, patterns: Sequence[str]) -> Pin:
        """Return the current commit of a revision, with its files that match a pattern."""

    def find_offline(self, repository: str, revision: str, patterns: Sequence[str]) -> Pin | None:
        """Return the commit of the last download of a revision; None if unknown, or if the cache has no hashes."""
        return None

    @abstractmethod
    def paths(self, pin: Pin, name: str) -> list[Path]:
        """Return the paths of a file in the cache, beginning with that of a download."""

    def part(self, pin: Pin, name: str) -> Path:
        """Return the path of an incomplete download."""
        path = self.paths(pin, name)[0]
        return path.with_name(path.name + self.part_suffix)

    @abstractmethod
    def download(self, pin: Pin, name: str, position: Position) -> Path:
        """Download a file into the cache, resuming an incomplete download, and check it.

        CorruptedError: it differs from the pinned file, and nothing is kept.
        """


def status_error(
    hub: str, log_in: str, file: str, status: int, reason: str, wait: float = 0, report_now: bool = False
) -> CheckpointError:
    """Return the error of an HTTP status; `wait` is the time in seconds that the hub requests."""
    if status == 401:
        return CheckpointError(f"{hub} requires a login for {file} (401): {log_in}")
    if status == 403:
        return CheckpointError(
            f"{hub} denies access to {file} (403): accept its terms on its page, ask its owner for access, or {log_in}"
            " with another account"
        )
    if status == 429:
        duration = f"{wait:.0f} s" if wait else "a few minutes"
        return TransientError(
            f"{hub} limits the rate of requests (429): wait {duration} and {RESUME}; for a higher limit, {log_in}",
            wait,
            report_now,
        )
    if status >= 500:
        return TransientError(
            f"{hub} failed to serve {file} ({status}): wait a little and {RESUME}", report_now=report_now
        )
    return CheckpointError(f"{hub} refuses {file} ({status}): {reason}")


class Position(AbstractContextManager["Position"]):
    """Position in a download, for a progress bar that only counts up; has the methods that both clients call."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._position = bar, 0

    def begin(self, position: int = 0) -> Position:
        """Set the number of bytes on disk; it falls when a download starts again."""
        self.update(position - self._position)
        return self

    def update(self, n: int) -> None:
        """Count `n` more bytes."""
        self._bar.update(n)
        self._position += n

    def end(self) -> None:
        """Do nothing, as the bar belongs to the caller."""

    def __exit__(self, *_: object) -> None: ...


def warn(message: str) -> None:
    """Print a message on stderr."""
    print(message, file=sys.stderr, flush=True)


def retry(act: Callable[[], Any]) -> Any:
    """Call `act` until it raises no TransientError, at most three times, and wait before each new attempt.

    Not `http_backoff` of huggingface_hub: it retries requests of its own client only.
    """
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
