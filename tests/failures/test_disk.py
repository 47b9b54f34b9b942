"""A disk that is full, or read-only: one sentence, nothing half-made under the final name, and the next run goes on."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from chain import command
from kills import undisturbed
from support import BIN, run_cli

Mount = Callable[[str, str], Path]
STAGES = ("onnx", "graphs", "bundles/int4", "reference", "evaluation/int4")
"""The source stage links or points to what is there already."""


def size(folder: Path) -> int:
    """Bytes of a stage's files."""
    return sum(entry["size"] for entry in json.loads((folder / "manifest.json").read_text())["outputs"].values())


def one_sentence(stderr: str) -> str:
    """The last line, which a rule shows; nothing in the log is a traceback."""
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("hf2mnn: ")
    return last


@pytest.mark.parametrize(
    ("stage", "share"), [(stage, 0.5) for stage in STAGES] + [("graphs", share) for share in (0.02, 0.2, 0.8, 0.95)]
)
def test_full_disk_in_the_middle_of_a_stage(stage: str, share: float, chain: Path, mount: Mount) -> None:
    needed = size(chain / stage)
    disk = mount("disk", f"size={max(int(needed * share), 4096)}")
    failed = run_cli(*command(chain, stage), "--out", disk / stage)
    assert failed.returncode == 1
    said = one_sentence(failed.stderr)
    assert f"the disk at {disk} is full" in said and "another disk" in said
    assert not (disk / stage).exists() and not list(disk.rglob(".*.partial"))
    mount("disk", f"size={4 * needed + 10**7}")
    again = run_cli(*command(chain, stage), "--out", disk / stage)
    assert again.returncode == 0, again.stderr
    assert undisturbed(disk / stage, chain / stage)


@pytest.mark.parametrize("stage", ["graphs", "evaluation/int4"])
def test_stage_needs_no_room_among_temporary_files(stage: str, chain: Path, mount: Mount, tmp_path: Path) -> None:
    """MNN's converter dumps graphs, and the engine writes its logits: into the stage's own folder."""
    temporary = mount("temporary", "size=64k")
    made = run_cli(*command(chain, stage), "--out", tmp_path / "made", env={"TMPDIR": str(temporary)})
    assert made.returncode == 0, made.stderr
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("size", [1000, 20_000, 60_000, 100_000])
def test_converter_whose_files_are_bounded(size: int, chain: Path, tmp_path: Path) -> None:
    """A quota cuts a file short as this does: MNN's converter goes on, and says that all went well."""
    arguments = [BIN / "hf2mnn", *map(str, command(chain, "graphs")), "--out", tmp_path / "made"]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    failed = subprocess.run(arguments, preexec_fn=limit, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "ulimit -f" in one_sentence(failed.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["source", *STAGES])
def test_read_only_disk(stage: str, chain: Path, mount: Mount) -> None:
    disk = mount("disk", "size=100M")
    mount("disk", "ro")
    failed = run_cli(*command(chain, stage), "--out", disk / stage)
    assert failed.returncode == 1
    said = one_sentence(failed.stderr)
    assert str(disk) in said and "read-only" in said
    assert not list(disk.iterdir())
    mount("disk", "rw")
    again = run_cli(*command(chain, stage), "--out", disk / stage)
    assert again.returncode == 0, again.stderr
    assert undisturbed(disk / stage, chain / stage)
