"""Bounds that the parsers are held to, and what was tried."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile import TALLY

ROOM = 1 << 29
"""Bytes of addresses beyond those that the process has when it begins."""


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A parser that allocates what a header asks for, and not what a file deserves, gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.cases:
        terminalreporter.write_line(
            f"{TALLY.cases} files: {TALLY.refused} refused, the slowest took {TALLY.slowest:.3f} s"
        )
