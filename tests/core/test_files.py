"""Files and folders that are either whole or not there: what a stage leaves when it fails, is killed, or runs again."""

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

from hf2mnn.core.files import link_or_copy, sha256, whole_file, whole_folder


def fill(path: Path, words: str) -> None:
    """Put `words` into what `whole_folder` or `whole_file` yielded."""
    (path / "part" if path.is_dir() else path).write_text(words)


def words(path: Path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


both = pytest.mark.parametrize("whole", [whole_folder, whole_file])
Whole = Callable[[Path], AbstractContextManager[Path]]


@both
@pytest.mark.parametrize("old", [False, True], ids=["first time", "over an old one"])
def test_failure_leaves_what_was_there_before(whole: Whole, old: bool, tmp_path: Path) -> None:
    """Also for an interrupt, which is no Exception: half a result under the final name would be taken for a result."""
    target = tmp_path / "results" / "made"
    if old:
        with whole(target) as path:
            fill(path, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole(target) as path:
            fill(path, "half")
            raise error
    assert [child.name for child in target.parent.iterdir()] == (["made"] if old else [])
    if old:
        assert words(target) == "old"


@both
def test_success_replaces_the_old_one_whole(whole: Whole, tmp_path: Path) -> None:
    """Nothing of the older result stays beside the new one: a file too many would be loaded, or shipped."""
    target = tmp_path / "made"
    with whole(target) as path:
        fill(path, "old")
        if path.is_dir():
            (path / "only in the old").touch()
    with whole(target) as path:
        fill(path, "new")
        assert words(target) == "old"  # until the end
    assert words(target) == "new"
    assert [path.name for path in tmp_path.rglob("*") if path.name not in ("made", "part")] == []


@both
def test_remains_of_a_killed_run_are_removed(whole: Whole, tmp_path: Path) -> None:
    """SIGKILL in the middle leaves no final name; the next run starts from nothing, not from the remains."""
    target = tmp_path / "made"
    program = f"""
import sys, time
from pathlib import Path
from hf2mnn.core.files import {whole.__name__} as whole
with whole(Path(sys.argv[1])) as path:
    (path / "half" if path.is_dir() else path).write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, target], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "here\n"
        os.kill(child.pid, signal.SIGKILL)
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the child had begun"
    with whole(target) as path:
        assert not path.is_dir() or list(path.iterdir()) == []
        fill(path, "whole")
    assert [child.name for child in tmp_path.iterdir()] == ["made"]
    assert words(target) == "whole"


def test_relative_folder_is_the_one_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that changes the working directory must not move the result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with whole_folder(Path("made")) as path:
        os.chdir("elsewhere")
        fill(path, "x")
    assert words(tmp_path / "made") == "x"


def test_link_or_copy_falls_back_to_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants share their weights on disk where that works; across file systems it does not."""
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


def test_death_while_an_old_folder_is_removed_harms_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an old folder under the final name would be taken for a stranger's files, and never be replaced."""
    target = tmp_path / "made"
    with whole_folder(target) as path:
        fill(path, "old")

    def die(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit), whole_folder(target) as path:
        fill(path, "new")
        patched.setattr(shutil, "rmtree", die)
    assert words(target) == "new"
    with whole_folder(target) as path:
        fill(path, "newer")
    assert words(target) == "newer" and [path.name for path in tmp_path.iterdir()] == ["made"]
