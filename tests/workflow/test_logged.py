"""What a person sees on the terminal of a job that fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import REPOSITORY, Workspace


def logged(log: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "workflow" / "logged", log, "sh", "-c", script, "a job"], capture_output=True, text=True
    )


def test_logs_of_a_run_hold_whole_lines(finished: Workspace) -> None:
    """A bar that is drawn over itself, ours or a library's, is one endless line there."""
    logs = list((finished.folder / "logs").rglob("*.log"))
    assert logs
    assert [log for log in logs if b"\r" in log.read_bytes()] == []


def test_job_that_ends_well_is_silent(tmp_path: Path) -> None:
    done = logged(tmp_path / "a log", "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a log").read_text().splitlines()[-2:] == ["out", "err"]


def test_log_says_where_and_what_before_anything_runs(tmp_path: Path) -> None:
    """Snakemake shows no log that comes after an empty one, as is that of a job which a scheduler ended at once."""
    logged(tmp_path / "log", "true")
    assert (tmp_path / "log").read_text() == f"on {os.uname().nodename}: sh -c true a job\n"


def test_job_that_fails_ends_with_its_last_lines(tmp_path: Path) -> None:
    done = logged(tmp_path / "log", "seq 9; echo 'hf2mnn: what, where' >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "8\n9\nhf2mnn: what, where\n")


def test_the_command_of_a_toolchain_comes_before_ours(tmp_path: Path) -> None:
    """A relative place, as the rules give it, is found by a command that changes its folder, too."""
    program = tmp_path / "a toolchain" / "bin" / "told"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho its own\n")
    program.chmod(0o755)
    words = ["log", "a toolchain/toolchain.json", "sh", "-c", "cd /; told"]
    done = subprocess.run([REPOSITORY / "workflow" / "logged", *words], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "log").read_text().splitlines()[1:] == ["its own"]


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_only_a_job_that_is_killed_is_put_down_to_want_of_memory(signal: str, tmp_path: Path) -> None:
    done = logged(tmp_path / "log", f"echo working; kill -{signal} $$")
    assert done.returncode == 1 and done.stderr.startswith("working\n")
    assert ("out of memory" in done.stderr) == (signal == "KILL")
