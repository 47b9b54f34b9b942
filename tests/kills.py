"""Kill stages at random moments, run them again by the same command, and hold what they make to an undisturbed run's.

`make test-kills` does it 200 times and prints a table; tests/machine/test_kills.py a few times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chain import command, make_chain
from hf2mnn.core.files import read_sha256
from hf2mnn.core.verify import verify_folder
from support import BIN

STAGES = ("source", "reference", "onnx", "graphs", "bundles/int4", "evaluation/int4", "report")
NATIVE = ("graphs", "bundles/int4", "evaluation/int4")
"""Those that start MNN, in a process of its own."""
TARGETS = ("group", "stage", "child")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
REPORT = ("summary.csv", "summary.parquet", "figures.csv", "figures.parquet", "report.html")
"""What the report writes beside the other stages' folders."""
CHILD = {"graphs": 0.1, "bundles/int4": 0.05, "evaluation/int4": 0.5}
"""Seconds that the first process of MNN's takes, or more, by stage."""
PATIENCE = 60.0
"""Seconds within which a stage that was told to end has ended."""


def undisturbed(folder: Path, right: Path) -> bool:
    """Whether a stage's folder is what an undisturbed run has made, and every byte of it whole."""
    verdicts = [verify_folder(one) for one in (folder, right)]
    return all(verdict.whole for verdict in verdicts) and verdicts[0].digest == verdicts[1].digest


@dataclass(frozen=True)
class Blow:
    """share: when, in parts of the stage's duration. target: the whole process group, the stage's process alone, or the
    process of MNN's that it has started (the first after that moment, and so far on its way).
    """

    stage: str
    share: float
    signal: signal.Signals
    target: str
    again: bool
    """Whether the stage's folder of an earlier run is there."""


@dataclass(frozen=True)
class Hit:
    """What a blow met. target: as in `Blow`, or "missed" where the stage had ended before; writing: a half-made folder
    or file was there.
    """

    blow: Blow
    target: str
    writing: bool
    wrong: list[str] = field(default_factory=list)


def draw_blows(stage: str, count: int, seed: int) -> list[Blow]:
    """One in each of `count` equal parts of the duration, in shuffled order; every kind as often as another."""
    chance = random.Random(f"{stage} {seed}")
    shares = [(index + chance.random()) / count for index in range(count)]
    chance.shuffle(shares)
    targets = TARGETS if stage in NATIVE else TARGETS[:2]
    kinds = [(number, target) for number in SIGNALS for target in targets]
    chance.shuffle(kinds)
    return [Blow(stage, share, *kinds[i % len(kinds)], i // len(kinds) % 2 == 1) for i, share in enumerate(shares)]


class Bench:
    """A stage of `chain`, run in a folder of its own with its own temporary files."""

    def __init__(self, stage: str, chain: Path, folder: Path) -> None:
        self.stage, self.results, self.temporary = stage, folder / "results", folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.out = self.results / "made"
        self.arguments = [*command(chain, stage), "--out", self.out]
        if stage == "report":
            # It writes beside the folders that it reads.
            self.out.mkdir(parents=True)
            for name in ("reference", "onnx", "mnn", "eval"):
                (self.out / name).symlink_to(chain / name)
            self.arguments = command(self.out, stage)
        self.results.mkdir(exist_ok=True)
        self.digest, self.duration = self._undisturbed()
        self.kept = self._temporary()

    def _start(self) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        words = [BIN / "hf2mnn", *map(str, self.arguments)]
        return subprocess.Popen(words, env=environment, start_new_session=True, **quiet)

    def _run(self) -> tuple[int, str]:
        process = self._start()
        said = process.communicate(timeout=600)[1]
        return process.returncode, said

    def _undisturbed(self) -> tuple[str, float]:
        """Twice: the first run fills the machine's caches, the second is timed."""
        made = []
        for _ in range(2):
            began = time.monotonic()
            code, said = self._run()
            assert code == 0, said
            made.append((self._digest(), time.monotonic() - began))
        assert made[0][0] == made[1][0], f"{self.stage} makes other files at its second run"
        return made[1]

    def _digest(self) -> str | None:
        """Of what lies under the final name; None where nothing does, or a table of the report is missing."""
        if self.stage == "report":
            paths = [self.out / name for name in REPORT]
            return " ".join(map(read_sha256, paths)) if all(path.exists() for path in paths) else None
        if not self.out.exists():
            return None
        verdict = verify_folder(self.out)
        return verdict.digest if verdict.whole and not verdict.unnamed else f"not whole: {verdict}"

    def _temporary(self) -> set[str]:
        return {path.name for path in self.temporary.iterdir()}

    def _half_made(self) -> list[str]:
        there = {path for folder in (self.results, self.out) if folder.exists() for path in folder.glob(".*")}
        return sorted(path.name for path in there if path.name != ".hf2mnn")

    def _left_over(self) -> list[str]:
        return self._half_made() + sorted(self._temporary() - self.kept)

    def _clear(self) -> None:
        if self.stage != "report":
            shutil.rmtree(self.out, ignore_errors=True)
        else:
            for name in REPORT:
                (self.out / name).unlink(missing_ok=True)

    def strike(self, blow: Blow) -> Hit:
        """One blow, and what is wrong afterwards: at once, and when the same command has run again."""
        if not blow.again:
            self._clear()
        process, began = self._start(), time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(blow.share * self.duration)
            # On a machine with other work, it had taken longer before.
            self.duration = time.monotonic() - began
        writing, target = bool(self._half_made()), self._hit(process, blow)
        said, wrong = process.communicate(timeout=PATIENCE)[1], []
        time.sleep(0.05)  # the kernel ends the children
        if any(psutil.pid_exists(one) and os.getpgid(one) == process.pid for one in _alive()):
            wrong.append("a process of it goes on")
            os.killpg(process.pid, signal.SIGKILL)
        if self._digest() not in (None, self.digest):
            wrong.append(f"half of it, or something else, is under the final name: {self._digest()}")
        if blow.signal == signal.SIGTERM or target == "child":
            wrong += [f"{name} is left" for name in self._left_over()]
            wrong += ["a traceback"] if "Traceback" in said else []
        code, said = self._run()
        if code != 0:
            wrong.append(f"it does not run again: {said[-500:]}")
        if self._digest() != self.digest:
            wrong.append(f"other files than those of an undisturbed run: {self._digest()}")
        wrong += [f"{name} is left after the run that followed" for name in self._left_over()]
        return Hit(blow, target, writing, wrong)

    def _hit(self, process: subprocess.Popen, blow: Blow) -> str:
        if process.poll() is not None:
            return "missed"
        if blow.target == "child":
            return _hit_child(psutil.Process(process.pid), blow)
        if blow.target == "group":
            os.killpg(process.pid, blow.signal)
        else:
            process.send_signal(blow.signal)
        return blow.target


def _hit_child(stage: psutil.Process, blow: Blow) -> str:
    with suppress(psutil.NoSuchProcess):
        while not (children := stage.children()) and stage.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        time.sleep(blow.share * CHILD[blow.stage])
        for child in children:
            child.send_signal(blow.signal)
            return "child"
    return "missed"


def _alive() -> list[int]:
    return [one.pid for one in psutil.process_iter(["status"]) if one.info["status"] != psutil.STATUS_ZOMBIE]


def kill_stage(stage: str, count: int, seed: int, chain: Path, folder: Path) -> tuple[float, list[Hit]]:
    """The stage's duration in seconds and `count` hits. A blow that came too late is dealt again, earlier."""
    bench, hits = Bench(stage, chain, folder), []
    for blow in draw_blows(stage, count, seed):
        while (hit := bench.strike(blow)).target == "missed":
            blow = Blow(stage, blow.share * 0.9, blow.signal, blow.target, blow.again)
        hits.append(hit)
    return bench.duration, hits


def row(stage: str, duration: float, hits: list[Hit]) -> str:
    """A line of the table in docs/faults.md."""
    signals = [sum(hit.blow.signal == number for hit in hits) for number in SIGNALS]
    targets = [sum(hit.target == target for hit in hits) for target in TARGETS]
    shares = [hit.blow.share for hit in hits]
    told = [f"{duration:.1f}", len(hits), *signals, *targets, sum(hit.writing for hit in hits)]
    told += [f"{min(shares):.2f} to {max(shares):.2f}", sum(bool(hit.wrong) for hit in hits)]
    return f"| {stage} | {' | '.join(map(str, told))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="over all stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this one's share; again for more")
    given = parser.parse_args()
    lost = []
    with tempfile.TemporaryDirectory(prefix="hf2mnn-kills-") as name:
        folder = Path(name)
        make_chain(folder / "chain")
        for index, stage in enumerate(STAGES):
            if stage not in (given.stage or STAGES):
                continue
            count = given.kills // len(STAGES) + (index < given.kills % len(STAGES))
            duration, hits = kill_stage(stage, count, given.seed, folder / "chain", folder / stage.replace("/", "-"))
            print(row(stage, duration, hits), flush=True)
            lost += [hit for hit in hits if hit.wrong]
    for hit in lost:
        print(json.dumps({"blow": str(hit.blow), "target": hit.target, "wrong": hit.wrong}), file=sys.stderr)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
