"""Messages for failures of the machine: what happened, where, and what to do."""

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
from hf2mnn.core.files import atomic_file, atomic_folder
from hf2mnn.core.machine_errors import explain_kill, machine_errno, machine_message


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ("the disk at /", "is full", "free", "another disk")),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ("quota", "free space")),
        (OSError(errno.EFBIG, "File too large"), ("larger", "ulimit -f")),
        (OSError(errno.EROFS, "Read-only file system", "/r/o"), ("/r/o", "read-only", "writable disk")),
        (OSError(errno.EIO, "Input/output error"), ("reports an error", "dmesg")),
        (PermissionError(errno.EACCES, "Permission denied", "/r/o"), ("/r/o", "permission denied", "grant this user")),
        (MemoryError(), ("memory ran out", "peak use", "--cores")),
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
def test_message_has_problem_path_and_remedy(error: Exception, parts: tuple[str, ...], tmp_path: Path) -> None:
    message = machine_message(error, tmp_path)
    for part in parts:
        assert part in message
    assert "\n" not in message
    if not isinstance(error, PermissionError):
        assert "run the same command again" in message


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        ValueError("bad"),
        MachineError(os.strerror(errno.ENOSPC)),
    ],
)
def test_other_errors_have_no_message(error: Exception, tmp_path: Path) -> None:
    assert machine_errno(error) is None and machine_message(error, tmp_path) is None


def test_a_missing_package_has_a_message_in_a_stage_too(tmp_path: Path) -> None:
    missing = pytest.raises(MachineError, match="has no Python module torchvision: run 'make setup'")
    with missing, atomic_folder(tmp_path / "made"):
        import torchvision.nothing  # noqa: F401
    message = machine_message(ImportError("libcuda.so.1: cannot open shared object file"), tmp_path)
    assert "cannot import a Python module (libcuda.so.1: cannot open" in message
    assert machine_message(ModuleNotFoundError("", name="hf2mnn.nothing"), tmp_path) is None, "a bug of this package"


@pytest.mark.parametrize("atomic", [atomic_folder, atomic_file])
def test_message_has_the_final_folder_on_a_full_disk(atomic: type, tmp_path: Path) -> None:
    """Not the hidden folder that a stage writes to, which no longer exists."""
    with pytest.raises(MachineError, match="is full") as refused, atomic(tmp_path / "made"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert ".partial" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


STAGE = """
import resource, sys
from pathlib import Path
from hf2mnn import cli
from hf2mnn.core.manifest import Manifest, stage_folder
resource.setrlimit(getattr(resource, sys.argv[2]), (int(sys.argv[3]),) * 2)
def stage(**_):
    with stage_folder(Path(sys.argv[1]), Manifest("test")) as folder:
        (folder / "weights").write_bytes(bytes(2 * 10**9)[: 10**7])
cli.app = stage
cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit a process differently")
@pytest.mark.parametrize(
    ("limit", "bound", "part"), [("RLIMIT_FSIZE", 10**6, "larger"), ("RLIMIT_AS", 10**9, "memory ran out")]
)
def test_limited_process_prints_one_line_and_leaves_nothing(limit: str, bound: int, part: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STAGE, str(tmp_path / "made"), limit, str(bound)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and part in line
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run([*command[:-1], str(resource.RLIM_INFINITY)]).returncode == 0
    assert (tmp_path / "made" / "manifest.json").exists()


def test_killed_child_differs_from_a_crashed_one() -> None:
    """SIGKILL means lack of memory, other signals a user or a scheduler; a crash has no such message."""
    assert "out of memory" in explain_kill("MNN's converter", -signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert f"stopped from outside (signal {number:d})" in explain_kill("MNN's converter", -number)
    for code in (0, 1, -signal.SIGSEGV, -signal.SIGABRT):
        assert explain_kill("MNN's converter", code) is None
