"""Full and read-only disks: one error message, no incomplete folder under the final name, and a rerun that succeeds."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from chain import STAGES, command
from kills import same_outputs
from support import BIN, run_cli

Mount = Callable[[str, str], Path]
LARGE = STAGES[1:]
"""Stages that write large files; that of the checkpoint writes links."""


def size(folder: Path) -> int:
    """Return the bytes of a stage's files."""
    return sum(entry["size"] for entry in json.loads((folder / "manifest.json").read_text())["outputs"].values())


def error_message(stderr: str) -> str:
    """Return the last line, which is the error message; a traceback fails the test."""
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.mark.parametrize(
    ("stage", "fraction"), [(stage, 0.5) for stage in LARGE] + [("graphs", part) for part in (0.02, 0.2, 0.8, 0.95)]
)
def test_full_disk_during_a_stage(stage: str, fraction: float, chain: Path, mount: Mount) -> None:
    needed = size(chain / stage)
    disk = mount("disk", f"size={max(int(needed * fraction), 4096)}")
    failed = run_cli(*command(chain, stage), "--out", disk / stage)
    assert failed.returncode == 1
    message = error_message(failed.stderr)
    assert f"the disk at {disk} is full" in message and "another disk" in message
    assert not (disk / stage).exists() and not list(disk.rglob(".*.partial"))
    mount("disk", f"size={4 * needed + 10**7}")
    again = run_cli(*command(chain, stage), "--out", disk / stage)
    assert again.returncode == 0, again.stderr
    assert same_outputs(disk / stage, chain / stage)


@pytest.mark.parametrize("stage", ["graphs", "evaluation/int4"])
def test_a_stage_needs_no_space_in_tmpdir(stage: str, chain: Path, mount: Mount, tmp_path: Path) -> None:
    """MNN's converter writes its dumps, and the engine its logits, into the stage's own folder."""
    temporary = mount("temporary", "size=64k")
    process = run_cli(*command(chain, stage), "--out", tmp_path / "out", env={"TMPDIR": str(temporary)})
    assert process.returncode == 0, process.stderr
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("size", [1000, 20_000, 60_000, 100_000])
def test_a_limit_on_file_sizes_in_the_converter(size: int, chain: Path, tmp_path: Path) -> None:
    """The limit truncates a file as a quota does, and MNN's converter reports success."""
    arguments = [BIN / "hf2mnn", *map(str, command(chain, "graphs")), "--out", tmp_path / "out"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    failed = subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "ulimit -f" in error_message(failed.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_read_only_disk(stage: str, chain: Path, mount: Mount) -> None:
    disk = mount("disk", "size=100M")
    mount("disk", "ro")
    failed = run_cli(*command(chain, stage), "--out", disk / stage)
    assert failed.returncode == 1
    message = error_message(failed.stderr)
    assert str(disk) in message and "read-only" in message
    assert not list(disk.iterdir())
    mount("disk", "rw")
    again = run_cli(*command(chain, stage), "--out", disk / stage)
    assert again.returncode == 0, again.stderr
    assert same_outputs(disk / stage, chain / stage)
