"""A stage that is killed, at whatever moment and however, loses nothing: the same command makes the same files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from chain import command
from hf2mnn.core.manifest import Manifest
from hf2mnn.core.verify import verify_folder
from kills import NATIVE, STAGES, TARGETS, kill_stage
from support import BIN, REPOSITORY, SHAPES_VL, Workspace, run_cli

QUANTIZE = [f'{{"bits": {bits}, "block": 64}}' for bits in (2, 3, 4, 5, 8)]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_stage_makes_the_same_when_it_runs_again(stage: str, chain: Path, tmp_path: Path) -> None:
    """Each signal to each target once; `make test-kills` does it at many more moments."""
    count = 2 * len(TARGETS if stage in NATIVE else TARGETS[:2])
    _, hits = kill_stage(stage, count, seed=1, chain=chain, folder=tmp_path)
    assert [(hit.blow, hit.wrong) for hit in hits if hit.wrong] == []
    assert len({(hit.blow.signal, hit.target) for hit in hits}) == count


def digest(folder: Path) -> str:
    verdict = verify_folder(folder)
    assert verdict.whole and not verdict.unnamed
    return verdict.digest


def test_ten_conversions_at_once_make_what_they_make_one_by_one(chain: Path, tmp_path: Path) -> None:
    """Ten processes in one working directory, half of them the converter's, half the quantizer's."""
    jobs = [command(chain, "graphs")] * 5
    jobs += [["quantize", chain / "onnx", chain / "graphs", "--decoder", weights] for weights in QUANTIZE]

    def words(index: int, folder: str) -> list[str]:
        return [str(BIN / "hf2mnn"), *map(str, jobs[index]), "--out", f"{folder}/{index}"]

    for index in range(len(jobs)):
        subprocess.run(words(index, "alone"), cwd=tmp_path, check=True, capture_output=True)
    together = [
        subprocess.Popen(words(index, "together"), cwd=tmp_path, stdout=subprocess.DEVNULL)
        for index in range(len(jobs))
    ]
    assert [process.wait(600) for process in together] == [0] * len(jobs)
    alone, together = ([digest(tmp_path / when / str(i)) for i in range(len(jobs))] for when in ("alone", "together"))
    assert alone == together and len(set(alone)) == 1 + len(QUANTIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


@pytest.mark.parametrize("when", [0, 2**32])
@pytest.mark.parametrize("stage", ["onnx", "graphs", "bundles/int4", "reference", "evaluation/int4"])
def test_clock_that_was_wrong_changes_nothing(stage: str, when: int, chain: Path, tmp_path: Path) -> None:
    """Inputs whose files are of 1970, or of 2106."""
    copied = tmp_path / "chain"
    subprocess.run(["cp", "-r", chain, copied], check=True)
    for path in copied.rglob("*"):
        os.utime(path, (when, when), follow_symlinks=False)
    made = run_cli(*command(copied, stage), "--out", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    assert digest(tmp_path / "made") == digest(chain / stage)


CONFIG = """
models:
  shapes-vl: {source: {path: models/shapes-vl}, evaluation: models/shapes-vl/evaluation}
variants:
  int4: {bits: 4, block: 64}
"""
TARGET = "results/shapes-vl/bundles/int4"


def started(workspace: Workspace) -> subprocess.Popen:
    words = [BIN / "snakemake", "-s", REPOSITORY / "Snakefile", "--cores", "2", TARGET]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=workspace.folder, start_new_session=True, **quiet)


def until_writing(workspace: Workspace, stage: str) -> None:
    partial = workspace.folder / "results" / "shapes-vl" / f".{stage}.partial"
    until = time.monotonic() + 300
    while not partial.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert partial.exists(), "the stage never started"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_killed_run_goes_on(how: signal.Signals, chain: Path, workspace: Workspace) -> None:
    """Snakemake alone gets the signal. After SIGKILL its lock is left, and a person has to say that nobody works there:
    Snakemake names the option, and docs/faults.md does.
    """
    (workspace.folder / "config.yaml").write_text(CONFIG)
    run = started(workspace)
    until_writing(workspace, "onnx")
    run.send_signal(how)
    run.wait(300)
    for process in psutil.process_iter():
        # A job that Snakemake has left alone ends by itself, or with the machine; here it is in the way.
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
    made = workspace.folder / "results" / "shapes-vl"
    outputs = [Manifest.load(folder).outputs for folder in (made / "graphs", chain / "graphs")]
    assert outputs[0] == outputs[1]
    assert Manifest.load(made / "checkpoint").digest() == Manifest.load(chain / "checkpoint").digest(), SHAPES_VL
    assert not list(made.rglob(".*.partial")) and not list(made.rglob(".*.old"))


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
