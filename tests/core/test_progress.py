"""Progress of long loops: one live bar on a terminal, whole lines in a log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tqdm.std

from hf2mnn.core import progress as module
from hf2mnn.core.progress import amount, duration, progress, steps


class Clock:
    """Replacement for tqdm's clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


def test_log_has_amount_rate_and_remaining_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("decoder", 1_540_000_000, "weights") as bar:
        for seconds, done in ((9, 270_000_000), (5.2, 142_000_000), (4, 100_000_000), (35, 1_028_000_000)):
            clock.now += seconds
            bar.update(done)
    assert capsys.readouterr().err.splitlines() == [
        "decoder: 412M/1.54G weights (27 %), 29.0M weights/s, 00:38 left",
        "decoder: 1.54G/1.54G weights in 00:53, 28.9M weights/s",
    ]


def test_log_has_the_unit_of_bytes_and_seconds_per_slow_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading a.bin", 4_000_000_000, "B") as bar:
        clock.now += 20
        bar.update(1_000_000_000)
    for _ in steps("PyTorch answers", range(3), "examples"):
        clock.now += 100
    assert capsys.readouterr().err.splitlines() == [
        "reading a.bin: 1.00GB/4.00GB (25 %), 50.0MB/s, 01:00 left",
        "reading a.bin: 1.00GB/4.00GB in 00:20, 50.0MB/s",
        "PyTorch answers: 1/3 examples (33 %), 100.00s/examples, 03:20 left",
        "PyTorch answers: 2/3 examples (67 %), 100.00s/examples, 01:40 left",
        "PyTorch answers: 3/3 examples in 05:00, 100.00s/examples",
    ]


def test_log_has_no_line_for_short_work(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("few", 3):
        clock.now += 0.9
    with progress("none", 0):
        pass
    assert capsys.readouterr().err == ""


LOG = """
from hf2mnn.core import progress
progress.MIN_SECONDS = 1e-6
with progress.progress("parts", 2) as bar:
    bar.update(2)
"""


def test_log_is_written_although_the_bars_of_other_libraries_are_disabled() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOG], env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"parts: 2/2 in 00:00, .*/s\n", done.stderr), done.stderr


def test_failed_block_has_no_last_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), progress("fails", 3):
        clock.now += 60
        raise ValueError
    assert capsys.readouterr().err == ""


def test_threads_lose_no_update(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("parts", 80_000) as bar, ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(lambda: [bar.update() for _ in range(10_000)])
        pool.shutdown()
        clock.now += 2
    assert capsys.readouterr().err == "parts: 80.0k/80.0k in 00:02, 40.0k/s\n"


def test_steps_yields_each_item_with_or_without_a_length() -> None:
    assert list(steps("some", "abc", "letters")) == ["a", "b", "c"]
    assert list(steps("some", iter("abc"), "letters", 3)) == ["a", "b", "c"]


def test_terminal_has_one_live_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "MIN_SECONDS", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("decoder", 2_000_000, "weights") as bar:
        bar.update(1_000_000)
        bar.update(1_000_000)
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.fullmatch(r"decoder: 100%\|.*\| 2.00M/2.00M \[.*\]\n", last), last


@pytest.mark.parametrize(
    ("value", "text", "of_bytes"),
    [
        (0, "0", "0 B"),
        (7, "7", "7 B"),
        (0.25, "0.25", "0.25 B"),
        (999.4, "999", "999 B"),
        (999.6, "1k", "1 kB"),
        (12345, "12.3k", "12.3 kB"),
        (1.54e9, "1.54G", "1.54 GB"),
        (15e15, "15000T", "15000 TB"),
    ],
)
def test_amount(value: float, text: str, of_bytes: str) -> None:
    assert (amount(value), amount(value, "B"), amount(value, "runs")) == (text, of_bytes, f"{text} runs")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (119, "119 s"), (119.7, "2 min 00 s"), (600, "10 min"), (7199, "2 h 00 min"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
