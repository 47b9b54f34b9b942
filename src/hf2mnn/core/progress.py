"""Progress of long loops: a tqdm bar on a terminal, a whole line every ten seconds in a log."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

LOG_INTERVAL = 10.0  # seconds between two lines of a log
MIN_SECONDS = 1.0  # duration from which on progress is shown
BYTES = "B"  # unit of bytes

Item = TypeVar("Item")


class _Lines:
    """File for tqdm that prints each state as a whole line on stderr, where tqdm overwrites one line."""

    def write(self, text: str) -> None:
        if line := " ".join(text.split()):
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None: ...


class Progress:
    """Progress of a loop that threads may share; tqdm's own counter is not protected."""

    def __init__(self, bar: Any, own_end: bool = False) -> None:
        self._bar, self._own_end, self._lock = bar, own_end, threading.Lock()

    def update(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        with self._lock:
            if self._own_end and self._bar.n + n >= self._bar.total:  # a log has its own last line
                self._bar.n += n
            else:
                self._bar.update(n)


@contextmanager
def progress(label: str, total: int, unit: str = "") -> Iterator[Progress]:
    """Show on stderr how much of a loop is done, its rate, and the remaining time; `unit` is a plural, or `BYTES`."""
    # Not at the top: tqdm reads TQDM_DISABLE at import, and the command line sets it for transformers' bars in logs.
    from tqdm import tqdm

    scaled, terminal = total >= 1000 or unit == BYTES, sys.stderr.isatty()
    word = f" {unit}" if scaled and unit and unit != BYTES else unit
    options = {"desc": label, "total": total, "unit": word, "unit_scale": scaled, "miniters": 1, "delay": MIN_SECONDS}
    if terminal:
        with tqdm(**options, dynamic_ncols=True) as bar:
            yield Progress(bar)
        return
    amounts = "{n_fmt}B/{total_fmt}B" if unit == BYTES else f"{{n_fmt}}/{{total_fmt}} {unit}".rstrip()
    line = f"{{desc}}: {amounts} ({{percentage:.0f}} %), {{rate_fmt}}, {{remaining}} left"
    options |= {"file": _Lines(), "disable": False, "bar_format": line, "mininterval": LOG_INTERVAL, "smoothing": 0}
    with tqdm(**options, leave=False) as bar:
        yield Progress(bar, own_end=True)
        state = bar.format_dict
    if state["elapsed"] >= MIN_SECONDS:
        last = f"{{desc}}: {amounts} in {{elapsed}}, {{rate_fmt}}"
        _Lines().write(tqdm.format_meter(**{**state, "bar_format": last}))


def steps(label: str, items: Iterable[Item], unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show progress: one is done when the next is requested; `total` is for lazy iterables."""
    with progress(label, len(items) if total is None else total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def amount(value: float, unit: str = "") -> str:
    """Format a number with three or four digits and a prefix: 7, 412M, 1.54G, or with `BYTES` 1.54 GB."""
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
    """Format seconds as 39 s, 3 min 20 s, 12 min or 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
