"""Killed stages and runs: the same command continues and writes the same files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from chain import STAGES as CHAIN
from chain import command
from hf2mnn.core.manifest import Manifest
from hf2mnn.core.verify import verify_folder
from kills import NATIVE, STAGES, TARGETS, kill_stage
from support import BIN, REPOSITORY, Workspace, run_cli

QUANTIZE = [f'{{"bits": {bits}, "block": 64}}' for bits in (2, 3, 4, 5, 8)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_writes_the_same_when_it_runs_again(stage: str, chain: Path, tmp_path: Path) -> None:
    """Each signal goes to each target once; `make test-kills` does this many more times."""
    count = 2 * len(TARGETS if stage in NATIVE else TARGETS[:2])
    _, results = kill_stage(stage, count, seed=1, chain=chain, folder=tmp_path)
    assert [(result.kill, result.problems) for result in results if result.problems] == []
    assert len({(result.kill.signal, result.target) for result in results}) == count


def digest(folder: Path) -> str:
    verdict = verify_folder(folder)
    assert verdict.intact and not verdict.unlisted
    return verdict.digest


def test_ten_conversions_in_parallel(chain: Path, tmp_path: Path) -> None:
    """Five conversions and five quantizations in one working directory write what they write one by one."""
    jobs = [command(chain, "graphs")] * 5
    jobs += [["quantize", chain / "onnx", chain / "graphs", "--decoder", weights] for weights in QUANTIZE]

    def arguments(index: int, folder: str) -> list[str]:
        return [str(BIN / "hf2mnn"), *map(str, jobs[index]), "--out", f"{folder}/{index}"]

    for index in range(len(jobs)):
        subprocess.run(arguments(index, "alone"), cwd=tmp_path, check=True, capture_output=True)
    processes = [
        subprocess.Popen(arguments(index, "together"), cwd=tmp_path, stdout=subprocess.DEVNULL)
        for index in range(len(jobs))
    ]
    assert [process.wait(600) for process in processes] == [0] * len(jobs)
    alone, together = ([digest(tmp_path / when / str(i)) for i in range(len(jobs))] for when in ("alone", "together"))
    assert alone == together and len(set(alone)) == 1 + len(QUANTIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


@pytest.mark.parametrize("when", [0, 2**32])
@pytest.mark.parametrize("stage", CHAIN[1:])
def test_modification_times_do_not_matter(stage: str, when: int, chain: Path, tmp_path: Path) -> None:
    """The files of the inputs have times of 1970 or of 2106."""
    copied = tmp_path / "chain"
    subprocess.run(["cp", "-r", chain, copied], check=True)
    for path in copied.rglob("*"):
        os.utime(path, (when, when), follow_symlinks=False)
    process = run_cli(*command(copied, stage), "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert digest(tmp_path / "out") == digest(chain / stage)


CONFIG = """
models:
  shapes-vl: {source: {path: models/shapes-vl}, evaluation: models/shapes-vl/evaluation}
variants:
  int4: {bits: 4, block: 64}
"""
TARGET = "results/shapes-vl/bundles/int4"


def start(workspace: Workspace) -> subprocess.Popen:
    arguments = [BIN / "snakemake", "-s", REPOSITORY / "Snakefile", "--cores", "2", TARGET]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(arguments, cwd=workspace.folder, start_new_session=True, **quiet)


def wait_for_writing(workspace: Workspace, stage: str) -> None:
    partial = workspace.folder / "results" / "shapes-vl" / f".{stage}.partial"
    end = time.monotonic() + 300
    while not partial.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert partial.exists(), "the stage did not start"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_a_killed_run_continues(how: signal.Signals, chain: Path, workspace: Workspace) -> None:
    """Only Snakemake gets the signal. After SIGKILL its lock remains, and the user removes it (docs/faults.md)."""
    (workspace.folder / "config.yaml").write_text(CONFIG)
    run = start(workspace)
    wait_for_writing(workspace, "onnx")
    run.send_signal(how)
    run.wait(300)
    for process in psutil.process_iter():
        # Jobs that outlive Snakemake would still write to the folder.
        if process.pid != run.pid and _session(process.pid) == run.pid:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
                process.wait(60)
    again = workspace.snakemake(TARGET)
    if how == signal.SIGKILL:
        assert again.returncode != 0 and "--unlock" in again.stdout + again.stderr
        workspace.snakemake("--unlock", check=True)
        again = workspace.snakemake(TARGET)
    assert again.returncode == 0, again.stdout + again.stderr
    results = workspace.folder / "results" / "shapes-vl"
    outputs = [Manifest.load(folder).outputs for folder in (results / "graphs", chain / "graphs")]
    assert outputs[0] == outputs[1]
    assert Manifest.load(results / "checkpoint").digest() == Manifest.load(chain / "checkpoint").digest()
    assert not list(results.rglob(".*.partial")) and not list(results.rglob(".*.old"))


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
