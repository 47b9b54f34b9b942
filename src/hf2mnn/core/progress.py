"""How far a long loop is: a live bar on a terminal, a whole line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

EVERY = 10.0
"""Seconds between two lines of a log."""
WORTH = 1.0
"""Nothing is said of what takes fewer seconds."""
BYTES = "B"
"""The unit whose amounts are written as kB, MB and GB of 1000."""

Item = TypeVar("Item")


class Progress(Protocol):
    """What `progress` gives."""

    def update(self, n: int = 1) -> None:
        """Count `n` more as done; any thread may."""


def amount(value: float, unit: str = "") -> str:
    """A number in at most three or four digits: 7, 412M, 1.54G, or, with the unit of bytes, 1.54 GB."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    whole = value >= 99.5 or (not prefix and float(value).is_integer())
    number = f"{value:.0f}" if whole else f"{value:.3g}"
    if unit == BYTES:
        return f"{number} {prefix}B"
    return f"{number}{prefix} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as 39 s, 3 min 20 s, 12 min or 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def speed(rate: float, unit: str) -> str:
    """What is done in a second; of what takes longer than that, the seconds of one."""
    each = unit != BYTES and 0 < rate < 1
    return f"{1 / rate:.3g} s each" if each else f"{amount(rate, BYTES if unit == BYTES else '')} a second"


class _Lines:
    """Whole lines on stderr: one every EVERY seconds, and one at the end."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.started = self.said = time.monotonic()

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.said < EVERY or self.done >= self.total:
            return
        self.said, rate = now, self.done / (now - self.started)
        left = f", {duration((self.total - self.done) / rate)} left" if rate else ""
        # A unit of bytes stands behind each number, a word only behind the second.
        done = amount(self.done, self.unit if self.unit == BYTES else "")
        share = f"{100 * self.done / self.total:.0f} %"
        self._say(f"{done} of {amount(self.total, self.unit)} ({share}), {speed(rate, self.unit)}{left}")

    def end(self) -> None:
        seconds = time.monotonic() - self.started
        if seconds >= WORTH:
            rate = f", {speed(self.done / seconds, self.unit)}" if self.done else ""
            self._say(f"{amount(self.done, self.unit)} in {duration(seconds)}{rate}")

    def _say(self, what: str) -> None:
        print(f"{self.label}: {what}", file=sys.stderr, flush=True)


class _Locked:
    def __init__(self, inner: Progress) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def update(self, n: int = 1) -> None:
        with self._lock:
            self._inner.update(n)


@contextmanager
def progress(label: str, total: int, unit: str = "") -> Iterator[Progress]:
    """Say on stderr what is done, how far it is, how fast it goes and how long it still takes.

    `total` is how many `unit`s (a word in the plural, or "B" for bytes) are to be done. In a log, a block that fails
    ends without a last line.
    """
    if sys.stderr.isatty():
        # Not before: the command line may still set TQDM_DISABLE, which is read when tqdm is imported.
        from tqdm import tqdm

        large = total >= 1000
        word = f" {unit}" if large and unit != BYTES else unit
        # miniters: of a loop that slows down tqdm would otherwise show nothing for long.
        with tqdm(
            desc=label, total=total, unit=word, unit_scale=large, miniters=1, delay=WORTH, dynamic_ncols=True
        ) as bar:
            yield _Locked(bar)
        return
    lines = _Lines(label, total, unit)
    yield _Locked(lines)
    lines.end()


def steps(label: str, items: Iterable[Item], unit: str, total: int | None = None) -> Iterator[Item]:
    """The items one after another, each done when the next is asked for. `total` is only for those without a length."""
    if total is None:
        assert isinstance(items, Collection)
        total = len(items)
    with progress(label, total, unit) as shown:
        for item in items:
            yield item
            shown.update()
