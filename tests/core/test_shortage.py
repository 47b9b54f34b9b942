"""Each failure of the machine is one sentence: what happened, where, and what to do."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hf2mnn.core.errors import MachineError
from hf2mnn.core.files import whole_file, whole_folder
from hf2mnn.core.shortage import ended_by_others, number, sentence


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("the disk at /", "is full", "free", "another disk")),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ("quota", "make room")),
        (OSError(errno.EFBIG, "File too large"), ("larger", "ulimit -f")),
        (OSError(errno.EROFS, "Read-only file system", "/r/o"), ("/r/o", "read-only", "can be written")),
        (OSError(errno.EIO, "Input/output error"), ("error", "dmesg")),
        (PermissionError(errno.EACCES, "Permission denied", "/r/o"), ("/r/o", "permission denied", "let this user")),
        (MemoryError(), ("memory ran out", " in use at most", "--cores")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ("memory ran out", "--cores")),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ("is full", "another disk")),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            ("memory ran out",),
        ),
        (RuntimeError("std::bad_alloc"), ("memory ran out",)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sentence_says_what_where_and_what_to_do(error: Exception, words: tuple[str, ...], tmp_path: Path) -> None:
    said = sentence(error, tmp_path)
    for word in words:
        assert word in said
    assert "\n" not in said
    if not isinstance(error, PermissionError):
        assert "run the same command again" in said


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        ValueError("bad"),
        MachineError(os.strerror(errno.ENOSPC)),
    ],
)
def test_other_errors_are_none_of_the_machines(error: Exception, tmp_path: Path) -> None:
    assert number(error) is None and sentence(error, tmp_path) is None


@pytest.mark.parametrize("whole", [whole_folder, whole_file])
def test_folder_that_fills_its_disk_is_named(whole: type, tmp_path: Path) -> None:
    """Not the hidden one that a stage writes to, which is gone when somebody reads this."""
    with pytest.raises(MachineError, match="is full") as refused, whole(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert ".partial" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


STAGE = """
import resource, sys
from pathlib import Path
from hf2mnn import cli
from hf2mnn.core.manifest import Manifest, stage_folder
resource.setrlimit(getattr(resource, sys.argv[2]), (int(sys.argv[3]),) * 2)
def stage():
    with stage_folder(Path(sys.argv[1]), Manifest("test")) as folder:
        (folder / "weights").write_bytes(bytes(2 * 10**9)[: 10**7])
cli.app = stage
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bound a process otherwise")
@pytest.mark.parametrize(
    ("limit", "bound", "words"), [("RLIMIT_FSIZE", 10**6, "larger"), ("RLIMIT_AS", 10**9, "memory ran out")]
)
def test_bounded_process_ends_in_one_line_and_leaves_nothing(
    limit: str, bound: int, words: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STAGE, str(tmp_path / "made"), limit, str(bound)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hf2mnn: ") and words in line
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run([*command[:-1], str(resource.RLIM_INFINITY)]).returncode == 0
    assert (tmp_path / "made" / "manifest.json").exists()


def test_child_that_others_have_ended_is_told_from_one_that_crashed() -> None:
    """SIGKILL is put down to want of memory, the signals of a person or a scheduler to them; a crash is its own."""
    assert "out of memory" in ended_by_others("MNN's converter", -signal.SIGKILL)
    for how in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert f"stopped from outside (signal {how:d})" in ended_by_others("MNN's converter", -how)
    for code in (0, 1, -signal.SIGSEGV, -signal.SIGABRT):
        assert ended_by_others("MNN's converter", code) is None
