"""Messages for failures of the machine: no disk space, no memory, no access, a missing package."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf2mnn.core.errors import MachineError
from hf2mnn.core.progress import BYTES, amount
from hf2mnn.machine.usage import children_mb, peak_mb

DENIED = (errno.EACCES, errno.EPERM)
DISK_MESSAGES = {
    errno.EDQUOT: ": the disk quota is exceeded; free space, or use a folder on another disk",
    errno.EFBIG: ": a file is larger than its disk or 'ulimit -f' allows; raise the limit, or use a folder on another"
    " disk",
    errno.EROFS: " is on a disk that is mounted read-only; use a folder on a writable disk",
    errno.EIO: ": the disk reports an error; check the system log (dmesg), or use another disk",
}
HANDLED = (errno.ENOSPC, errno.ENOMEM, *DENIED, *DISK_MESSAGES)
CONTINUE = "then run the same command again: it continues after the last finished stage"
MIN_FREE = 1 << 24  # free bytes below which a disk counts as full
MORE_MEMORY = f"run fewer jobs at a time (--cores), end other programs, or use a larger machine, {CONTINUE}"
NATIVE_MESSAGES = {os.strerror(code): code for code in HANDLED if code not in DENIED}
NATIVE_MESSAGES |= dict.fromkeys(("can't allocate memory", "bad_alloc", "bad allocation"), errno.ENOMEM)
"""errno by a part of the message in exceptions of native libraries (safetensors, torch, ONNX Runtime)."""


def machine_errno(error: BaseException) -> int | None:
    """Return the errno of a failure of the machine, or None for another error."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in HANDLED else None
    if isinstance(error, MachineError):
        return None
    message = str(error)
    return next((code for part, code in NATIVE_MESSAGES.items() if part in message), None)


def _mount_point(path: Path) -> Path:
    """Return the mount point of a path, which need not exist."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_mount() or folder == folder.parent)


def disk_full_message(folder: Path) -> str:
    """Return the message for a full disk: that of `folder`, or that of TMPDIR if the first has space."""
    disks = [_mount_point(folder), _mount_point(Path(tempfile.gettempdir()))]
    usage = {disk: shutil.disk_usage(disk) for disk in disks}
    disk = disks[0] if usage[disks[0]].free < MIN_FREE else min(disks, key=lambda disk: usage[disk].free)
    space = f"{amount(usage[disk].free, BYTES)} of {amount(usage[disk].total, BYTES)} free"
    return (
        f"the disk at {disk} is full ({space}); free space on it, or move its files (results, or with TMPDIR temporary"
        f" files) to another disk, {CONTINUE}"
    )


def machine_message(error: BaseException, folder: Path) -> str | None:
    """Return the message for a failure of the machine while `folder` was written to, or None for another error."""
    if isinstance(error, ImportError) and not (error.name or "").startswith("hf2mnn"):
        missing = isinstance(error, ModuleNotFoundError) and error.name
        problem = f"has no Python module {error.name}" if missing else f"cannot import a Python module ({error})"
        return f"the environment {sys.prefix} {problem}: run 'make setup', or install requirements.txt into it"
    code = machine_errno(error)
    if code is None:
        return None
    path = getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
    if code == errno.ENOSPC:
        return disk_full_message(folder)
    if code == errno.ENOMEM:
        return f"memory ran out (peak use {amount(peak_mb() * 1e6, BYTES)}); {MORE_MEMORY}"
    if code in DENIED:
        return f"{path}: {os.strerror(code).lower()}; grant this user access to it, or use another folder"
    return f"{path}{DISK_MESSAGES[code]}, {CONTINUE}"


@contextmanager
def machine_errors(folder: Path) -> Iterator[None]:
    """Raise MachineError, with its message, in place of a failure of the machine in a block that writes to `folder`."""
    try:
        yield
    except Exception as error:
        message = machine_message(error, folder)
        if message is None:
            raise
        raise MachineError(message) from error


def explain_kill(process: str, code: int) -> str | None:
    """Return a message for a child process that a signal from outside ended, or None if it ended by itself.

    `code` is its exit code, negative for a signal; not that of a process that exceeded its time limit.
    """
    if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return f"{process} was stopped from outside (signal {-code}); run the same command again"
    if -code != signal.SIGKILL:
        return None
    memory = children_mb()
    held = f", with {amount(memory * 1e6, BYTES)} in use" if memory else ""
    return f"{process} was killed (signal 9){held}: usually the machine is out of memory; {MORE_MEMORY}"
