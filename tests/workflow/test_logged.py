"""Terminal output of a failed job."""

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
    """A progress bar, ours or a library's, would be one endless line."""
    logs = list((finished.folder / "logs").rglob("*.log"))
    assert logs
    assert [log for log in logs if b"\r" in log.read_bytes()] == []


def test_successful_job_prints_nothing(tmp_path: Path) -> None:
    done = logged(tmp_path / "a log", "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a log").read_text().splitlines()[-2:] == ["out", "err"]


def test_log_begins_with_host_and_command(tmp_path: Path) -> None:
    """Snakemake prints no log after an empty one, as of a job that a scheduler stopped at once."""
    logged(tmp_path / "log", "true")
    assert (tmp_path / "log").read_text() == f"on {os.uname().nodename}: sh -c true a job\n"


def test_failed_job_prints_its_last_lines(tmp_path: Path) -> None:
    done = logged(tmp_path / "log", "seq 9; echo 'error: what, where' >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "8\n9\nerror: what, where\n")


def test_command_of_a_toolchain_takes_precedence(tmp_path: Path) -> None:
    """A relative path, as in the rules, also works for a command that changes its folder."""
    program = tmp_path / "a toolchain" / "bin" / "program"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho its own\n")
    program.chmod(0o755)
    words = ["log", "a toolchain/toolchain.json", "sh", "-c", "cd /; program"]
    done = subprocess.run([REPOSITORY / "workflow" / "logged", *words], cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "log").read_text().splitlines()[1:] == ["its own"]


@pytest.mark.parametrize("signal", ["KILL", "TERM"])
def test_only_sigkill_is_attributed_to_memory(signal: str, tmp_path: Path) -> None:
    done = logged(tmp_path / "log", f"echo working; kill -{signal} $$")
    assert done.returncode == 1 and done.stderr.startswith("working\n")
    assert ("out of memory" in done.stderr) == (signal == "KILL")
