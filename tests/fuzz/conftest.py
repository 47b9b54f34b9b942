"""Limit the memory of parsers, and print totals."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile import TALLY

MEMORY = 1 << 29
"""Address space in bytes that a parser may add to that of the process."""


@pytest.fixture(autouse=True)
def limit_memory() -> Iterator[None]:
    """Raise MemoryError in a parser that allocates by the claims of a header instead of the size of the file."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.cases:
        terminalreporter.write_line(
            f"{TALLY.cases} files: {TALLY.refused} refused, at most {TALLY.most_calls} function calls"
        )
