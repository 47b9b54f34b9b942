"""Kill stages at random moments, run the same command again, and compare the outputs with those of an undisturbed run.

`make test-kills` does this 200 times and prints a table; tests/failures/test_kills.py does it a few times.
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

from chain import STAGES as CHAIN
from chain import command, make_chain
from hf2mnn.core.files import read_sha256
from hf2mnn.core.verify import verify_folder
from support import BIN

STAGES = (*CHAIN, "report")
NATIVE = ("graphs", "bundles/int4", "evaluation/int4")
"""Stages that start MNN in a child process."""
TARGETS = ("group", "stage", "child")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
REPORT = ("summary.csv", "summary.parquet", "figures.csv", "figures.parquet", "report.html")
"""Files that the report writes beside the folders of other stages."""
CHILD = {"graphs": 0.1, "bundles/int4": 0.05, "evaluation/int4": 0.5}
"""Shortest duration of the first child process in seconds, by stage."""
PATIENCE = 60.0
"""Seconds within which a stage must end after a signal."""


def same_outputs(folder: Path, expected: Path) -> bool:
    """Return whether both stage folders match their manifests and have the same digest."""
    verdicts = [verify_folder(path) for path in (folder, expected)]
    return all(verdict.intact for verdict in verdicts) and verdicts[0].digest == verdicts[1].digest


@dataclass(frozen=True)
class Kill:
    """A kill to be carried out.

    Attributes:
        stage: One of STAGES.
        fraction: Moment as a fraction of the stage's duration.
        signal: Signal to send.
        target: "group" (all processes), "stage" (its process alone) or "child" (the first process of MNN after that
            moment, when it is as far on its way).
        again: Whether the stage's folder of an earlier run exists.
    """

    stage: str
    fraction: float
    signal: signal.Signals
    target: str
    again: bool


@dataclass(frozen=True)
class Result:
    """Result of a kill.

    Attributes:
        kill: The kill.
        target: As in `Kill`, or "missed" if the stage had ended before.
        writing: Whether the stage had unfinished files.
        problems: What is wrong afterwards.
    """

    kill: Kill
    target: str
    writing: bool
    problems: list[str] = field(default_factory=list)


def draw_kills(stage: str, count: int, seed: int) -> list[Kill]:
    """Draw one kill in each of `count` equal parts of the duration, with all kinds equally often, in random order."""
    rng = random.Random(f"{stage} {seed}")
    fractions = [(index + rng.random()) / count for index in range(count)]
    rng.shuffle(fractions)
    targets = TARGETS if stage in NATIVE else TARGETS[:2]
    kinds = [(number, target) for number in SIGNALS for target in targets]
    rng.shuffle(kinds)
    return [Kill(stage, part, *kinds[i % len(kinds)], i // len(kinds) % 2 == 1) for i, part in enumerate(fractions)]


class Bench:
    """A stage of `chain` in its own folder, with its own temporary files."""

    def __init__(self, stage: str, chain: Path, folder: Path) -> None:
        self.stage, self.results, self.temporary = stage, folder / "results", folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.out = self.results / "out"
        self.arguments = [*command(chain, stage), "--out", self.out]
        if stage == "report":
            # It writes beside the folders that it reads.
            self.out.mkdir(parents=True)
            for path in chain.iterdir():
                (self.out / path.name).symlink_to(path)
            self.arguments = command(self.out, stage)
        self.results.mkdir(exist_ok=True)
        self.digest, self.duration = self._run_undisturbed()
        self.kept = self._temporary_files()

    def _start(self) -> subprocess.Popen:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        arguments = [BIN / "hf2mnn", *map(str, self.arguments)]
        return subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)

    def _run(self) -> tuple[int, str]:
        process = self._start()
        stderr = process.communicate(timeout=600)[1]
        return process.returncode, stderr

    def _run_undisturbed(self) -> tuple[str, float]:
        """Return digest and duration of a second run; the first fills the caches of the machine."""
        runs = []
        for _ in range(2):
            start = time.monotonic()
            code, stderr = self._run()
            assert code == 0, stderr
            runs.append((self._digest(), time.monotonic() - start))
        assert runs[0][0] == runs[1][0], f"two runs of {self.stage} write different files"
        return runs[1]

    def _digest(self) -> str | None:
        """Return the digest under the final name; None if it does not exist or a table of the report is missing."""
        if self.stage == "report":
            paths = [self.out / name for name in REPORT]
            return " ".join(map(read_sha256, paths)) if all(path.exists() for path in paths) else None
        if not self.out.exists():
            return None
        verdict = verify_folder(self.out)
        return verdict.digest if verdict.intact and not verdict.unlisted else f"not intact: {verdict}"

    def _temporary_files(self) -> set[str]:
        return {path.name for path in self.temporary.iterdir()}

    def _unfinished(self) -> list[str]:
        paths = {path for folder in (self.results, self.out) if folder.exists() for path in folder.glob(".*")}
        return sorted(path.name for path in paths if path.name != ".hf2mnn")

    def _leftovers(self) -> list[str]:
        return self._unfinished() + sorted(self._temporary_files() - self.kept)

    def _clear(self) -> None:
        if self.stage != "report":
            shutil.rmtree(self.out, ignore_errors=True)
            return
        for name in REPORT:
            (self.out / name).unlink(missing_ok=True)

    def carry_out(self, kill: Kill) -> Result:
        """Kill the stage, check its files, run it again, and check them again."""
        if not kill.again:
            self._clear()
        process, start = self._start(), time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(kill.fraction * self.duration)
            # The stage ended before: other work on the machine made the first runs slower.
            self.duration = time.monotonic() - start
        writing, target = bool(self._unfinished()), self._send(process, kill)
        stderr, problems = process.communicate(timeout=PATIENCE)[1], []
        time.sleep(0.05)  # the kernel ends the children
        if any(psutil.pid_exists(pid) and os.getpgid(pid) == process.pid for pid in _alive()):
            problems.append("a process of the stage is still running")
            os.killpg(process.pid, signal.SIGKILL)
        if self._digest() not in (None, self.digest):
            problems.append(f"incomplete or other files under the final name: {self._digest()}")
        if kill.signal == signal.SIGTERM or target == "child":
            problems += [f"{name} remains" for name in self._leftovers()]
            problems += ["a traceback"] if "Traceback" in stderr else []
        code, stderr = self._run()
        if code != 0:
            problems.append(f"the stage does not run again: {stderr[-500:]}")
        if self._digest() != self.digest:
            problems.append(f"other files than those of an undisturbed run: {self._digest()}")
        problems += [f"{name} remains after the second run" for name in self._leftovers()]
        return Result(kill, target, writing, problems)

    def _send(self, process: subprocess.Popen, kill: Kill) -> str:
        if process.poll() is not None:
            return "missed"
        if kill.target == "child":
            return _send_to_child(psutil.Process(process.pid), kill)
        if kill.target == "group":
            os.killpg(process.pid, kill.signal)
        else:
            process.send_signal(kill.signal)
        return kill.target


def _send_to_child(stage: psutil.Process, kill: Kill) -> str:
    with suppress(psutil.NoSuchProcess):
        while not (children := stage.children()) and stage.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        time.sleep(kill.fraction * CHILD[kill.stage])
        for child in children:
            child.send_signal(kill.signal)
            return "child"
    return "missed"


def _alive() -> list[int]:
    processes = psutil.process_iter(["status"])
    return [process.pid for process in processes if process.info["status"] != psutil.STATUS_ZOMBIE]


def kill_stage(stage: str, count: int, seed: int, chain: Path, folder: Path) -> tuple[float, list[Result]]:
    """Return the stage's duration in seconds and `count` results; a kill that comes too late is repeated earlier."""
    bench, results = Bench(stage, chain, folder), []
    for kill in draw_kills(stage, count, seed):
        while (result := bench.carry_out(kill)).target == "missed":
            kill = Kill(stage, kill.fraction * 0.9, kill.signal, kill.target, kill.again)
        results.append(result)
    return bench.duration, results


def table_row(stage: str, duration: float, results: list[Result]) -> str:
    """Return a row of the table in docs/faults.md."""
    signals = [sum(result.kill.signal == number for result in results) for number in SIGNALS]
    targets = [sum(result.target == target for result in results) for target in TARGETS]
    fractions = [result.kill.fraction for result in results]
    cells = [f"{duration:.1f}", len(results), *signals, *targets, sum(result.writing for result in results)]
    cells += [f"{min(fractions):.2f} to {max(fractions):.2f}", sum(bool(result.problems) for result in results)]
    return f"| {stage} | {' | '.join(map(str, cells))} |"


def main() -> None:
    """Kill all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of kills over all stages")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--stage", choices=STAGES, action="append", help="kill only this stage; repeat for more")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(prefix="hf2mnn-kills-") as name:
        folder = Path(name)
        make_chain(folder / "chain")
        for index, stage in enumerate(STAGES):
            if stage not in (options.stage or STAGES):
                continue
            count = options.kills // len(STAGES) + (index < options.kills % len(STAGES))
            duration, results = kill_stage(
                stage, count, options.seed, folder / "chain", folder / stage.replace("/", "-")
            )
            print(table_row(stage, duration, results), flush=True)
            failed += [result for result in results if result.problems]
    for result in failed:
        print(
            json.dumps({"kill": str(result.kill), "target": result.target, "problems": result.problems}),
            file=sys.stderr,
        )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
