"""What a person is told when the machine fails: no room, no memory, or no leave to write."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf2mnn.core.errors import MachineError
from hf2mnn.core.progress import BYTES, amount
from hf2mnn.machine.usage import children_mb, peak_mb

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM)
KNOWN = (*FULL, *REFUSED, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOMEM)
AGAIN = "then run the same command again: it goes on after the last stage that has finished"
ROOM = 1 << 24
"""Bytes; a disk with less is full."""
MORE_MEMORY = f"let fewer jobs run at a time (--cores), end other programs, or take a larger machine, {AGAIN}"
SAID = {os.strerror(code): code for code in KNOWN if code not in REFUSED}
SAID |= dict.fromkeys(("can't allocate memory", "bad_alloc", "bad allocation"), errno.ENOMEM)
"""What libraries that are no Python say in exceptions of their own (safetensors, torch, ONNX Runtime)."""


def number(error: BaseException) -> int | None:
    """The errno of a failure of the machine; None for any other error."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in KNOWN else None
    if isinstance(error, MachineError):
        return None
    told = str(error)
    return next((code for said, code in SAID.items() if said in told), None)


def _mounted(path: Path) -> Path:
    """Where the disk of a path is mounted; the path need not be there yet."""
    path = path.absolute()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def full(folder: Path) -> str:
    """The disk of `folder`, where a stage's temporary files are too; where it has room, that of other commands'
    temporary files.
    """
    disks = [_mounted(folder), _mounted(Path(tempfile.gettempdir()))]
    used = {disk: shutil.disk_usage(disk) for disk in disks}
    disk = disks[0] if used[disks[0]].free < ROOM else min(disks, key=lambda disk: used[disk].free)
    room = f"{amount(used[disk].free, BYTES)} of {amount(used[disk].total, BYTES)} free"
    return (
        f"the disk at {disk} is full ({room}); make room on it, or have what is written there (results, or with TMPDIR"
        f" temporary files) on another disk, {AGAIN}"
    )


def sentence(error: BaseException, folder: Path) -> str | None:
    """What happened, where, and what to do; None for an error that is not the machine's. `folder` was to be written."""
    code = number(error)
    if code is None:
        return None
    where = getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
    if code == errno.ENOSPC:
        return full(folder)
    if code == errno.EDQUOT:
        return f"{where}: the disk quota is used up; make room, or have the folder on another disk, {AGAIN}"
    if code == errno.EFBIG:
        return (
            f"{where}: a file is larger than its disk or 'ulimit -f' allows; raise the limit, or have the folder on"
            f" another disk, {AGAIN}"
        )
    if code == errno.EROFS:
        return f"{where} is on a disk that is mounted read-only; have the folder on one that can be written, {AGAIN}"
    if code == errno.EIO:
        return f"{where}: the disk reports an error; look at the machine's log (dmesg), or take another disk, {AGAIN}"
    if code == errno.ENOMEM:
        return f"memory ran out ({amount(peak_mb() * 1e6, BYTES)} were in use at most); {MORE_MEMORY}"
    return f"{where}: {os.strerror(code).lower()}; let this user read and write there, or give another folder"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A block that writes to `folder`.

    Raises:
        MachineError: in place of an error that is the machine's.
    """
    try:
        yield
    except Exception as error:
        said = sentence(error, folder)
        if said is None:
            raise
        raise MachineError(said) from error


def ended_by_others(what: str, code: int) -> str | None:
    """Of a child process with the exit code `code`, that somebody, or the kernel, has ended it; None where it has ended
    by itself. One that is out of its time limit is not asked about.
    """
    if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return f"{what} was stopped from outside (signal {-code}); run the same command again"
    if -code != signal.SIGKILL:
        return None
    used = children_mb()
    held = f", when it held {amount(used * 1e6, BYTES)}" if used else ""
    return f"{what} was killed (signal 9){held}: most of the time the machine is out of memory; {MORE_MEMORY}"
