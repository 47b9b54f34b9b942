"""Atomic files and folders: what remains after a failure, a kill, or a second run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from hf2mnn.core.files import atomic_file, atomic_folder, link_or_copy, sha256


def fill(path: Path, text: str) -> None:
    """Write `text` to the path that `atomic_folder` or `atomic_file` yielded."""
    (path / "part" if path.is_dir() else path).write_text(text)


def content(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


both = pytest.mark.parametrize("atomic", [atomic_folder, atomic_file])
Atomic = Callable[[Path], AbstractContextManager[Path]]


@both
@pytest.mark.parametrize("old", [False, True], ids=["new", "existing"])
def test_failure_keeps_the_previous_content(atomic: Atomic, old: bool, tmp_path: Path) -> None:
    """Also for an interrupt, which is not an Exception: an incomplete result must not have the final name."""
    target = tmp_path / "results" / "made"
    if old:
        with atomic(target) as path:
            fill(path, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic(target) as path:
            fill(path, "half")
            raise error
    assert [child.name for child in target.parent.iterdir()] == (["made"] if old else [])
    if old:
        assert content(target) == "old"


@both
def test_success_replaces_the_whole_previous_content(atomic: Atomic, tmp_path: Path) -> None:
    """No file of the old result stays: it would be loaded, or shipped."""
    target = tmp_path / "made"
    with atomic(target) as path:
        fill(path, "old")
        if path.is_dir():
            (path / "only in the old").touch()
    with atomic(target) as path:
        fill(path, "new")
        assert content(target) == "old"  # until the end
    assert content(target) == "new"
    assert [path.name for path in tmp_path.rglob("*") if path.name not in ("made", "part")] == []


@both
def test_remains_of_a_killed_run_are_removed(atomic: Atomic, tmp_path: Path) -> None:
    """After SIGKILL nothing has the final name, and the next run starts from an empty folder."""
    target = tmp_path / "made"
    program = f"""
import sys, time
from pathlib import Path
from hf2mnn.core.files import {atomic.__name__} as atomic
with atomic(Path(sys.argv[1])) as path:
    (path / "half" if path.is_dir() else path).write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, target], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "here\n"
        os.kill(child.pid, signal.SIGKILL)
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the child had started"
    with atomic(target) as path:
        assert not path.is_dir() or list(path.iterdir()) == []
        fill(path, "whole")
    assert [child.name for child in tmp_path.iterdir()] == ["made"]
    assert content(target) == "whole"


def test_relative_path_is_resolved_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that changes the working directory does not move the result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with atomic_folder(Path("made")) as path:
        os.chdir("elsewhere")
        fill(path, "x")
    assert content(tmp_path / "made") == "x"


def test_link_or_copy_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard links share the weights of variants; across file systems a copy replaces them."""
    source = tmp_path / "checkpoint"
    source.write_bytes(b"weights")
    link_or_copy(source, tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source)

    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, tmp_path / "copied")
    assert not (tmp_path / "copied").samefile(source)
    assert sha256(tmp_path / "copied") == sha256(source)


def test_kill_while_the_old_folder_is_removed_damages_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partly removed folder under the final name would be taken for user files, and never be replaced."""
    target = tmp_path / "made"
    with atomic_folder(target) as path:
        fill(path, "old")

    def die(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit), atomic_folder(target) as path:
        fill(path, "new")
        patched.setattr(shutil, "rmtree", die)
    assert content(target) == "new"
    with atomic_folder(target) as path:
        fill(path, "newer")
    assert content(target) == "newer" and [path.name for path in tmp_path.iterdir()] == ["made"]
