"""What a person sees of a long loop: on a terminal, and in the log that a batch system keeps."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf2mnn.core import progress as module
from hf2mnn.core.progress import amount, duration, progress, speed, steps


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", made)
    return made


def test_log_says_what_how_far_how_fast_how_long(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("decoder", 1_540_000_000, "weights") as shown:
        for seconds, done in ((9, 270_000_000), (5.2, 142_000_000), (4, 100_000_000), (35, 1_028_000_000)):
            clock.now += seconds
            shown.update(done)
    assert capsys.readouterr().err.splitlines() == [
        "decoder: 412M of 1.54G weights (27 %), 29M a second, 39 s left",
        "decoder: 1.54G weights in 53 s, 28.9M a second",
    ]


def test_log_counts_bytes_by_their_own_unit_and_slow_things_by_the_seconds_of_one(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("reading a.bin", 4_000_000_000, "B") as shown:
        clock.now += 20
        shown.update(1_000_000_000)
    for _ in steps("PyTorch answers", range(3), "examples"):
        clock.now += 100
    assert capsys.readouterr().err.splitlines() == [
        "reading a.bin: 1 GB of 4 GB (25 %), 50 MB a second, 60 s left",
        "reading a.bin: 1 GB in 20 s, 50 MB a second",
        "PyTorch answers: 1 of 3 examples (33 %), 100 s each, 3 min 20 s left",
        "PyTorch answers: 2 of 3 examples (67 %), 100 s each, 100 s left",
        "PyTorch answers: 3 examples in 5 min 00 s, 100 s each",
    ]


def test_log_says_nothing_of_what_is_short(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("few", 3):
        clock.now += 0.9
    with progress("none", 0):
        pass
    assert capsys.readouterr().err == ""


def test_failed_block_is_not_told_as_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), progress("fails", 3):
        clock.now += 60
        raise ValueError
    assert capsys.readouterr().err == ""


def test_threads_lose_no_update(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("parts", 80_000) as shown, ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(lambda: [shown.update() for _ in range(10_000)])
        pool.shutdown()
        clock.now += 2
    assert capsys.readouterr().err == "parts: 80k in 2 s, 40k a second\n"


def test_steps_gives_each_item_and_takes_a_length_from_who_has_none() -> None:
    assert list(steps("some", "abc", "letters")) == ["a", "b", "c"]
    assert list(steps("some", iter("abc"), "letters", 3)) == ["a", "b", "c"]


def test_terminal_has_one_live_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("decoder", 2_000_000, "weights") as shown:
        shown.update(1_000_000)
        shown.update(1_000_000)
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.fullmatch(r"decoder: 100%\|.*\| 2.00M/2.00M \[.*\]\n", last), last


@pytest.mark.parametrize(
    ("value", "words", "of_bytes"),
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
def test_amount(value: float, words: str, of_bytes: str) -> None:
    assert (amount(value), amount(value, "B"), amount(value, "runs")) == (words, of_bytes, f"{words} runs")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (119, "119 s"), (119.7, "2 min 00 s"), (600, "10 min"), (7199, "2 h 00 min"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_speed_of_bytes_is_never_turned_over() -> None:
    assert (speed(0.5, "runs"), speed(0.5, "B")) == ("2 s each", "0.5 B a second")
