"""Files and folders that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hf2mnn.core.progress import BYTES, progress
from hf2mnn.core.shortage import explained

BLOCK = 1 << 20
"""Bytes that are read at a time."""
LARGE = 100_000_000
"""Bytes from which on reading a file twice is worth avoiding."""
AT_ONCE = 4
"""Files that are read at the same time."""
_read_before: dict[tuple[int, ...], str] = {}


def condition(path: Path) -> list[int]:
    """What changes when a file is written to or replaced: its inode, its size in bytes, and when that was, in ns."""
    state = path.stat()
    return [state.st_ino, state.st_size, state.st_mtime_ns]


def _key(path: Path) -> tuple[int, ...]:
    return (path.stat().st_dev, *condition(path))


def recall(path: Path, digest: str) -> None:
    """Let `sha256` take a file that was read before, and is in the same condition, as read."""
    _read_before[_key(path)] = digest


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks; of a large file it says how far it is. That is read once in a
    process, whatever it is called, as long as nobody writes to it.
    """
    size, key = path.stat().st_size, _key(path)
    if key in _read_before:
        return _read_before[key]
    digest = read_sha256(path)
    if size >= LARGE:
        _read_before[key] = digest
    return digest


def sha256_of(paths: Iterable[Path]) -> dict[Path, str]:
    """The same of several files, at the same time."""
    paths = list(paths)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))


def read_sha256(path: Path) -> str:
    """Hex digest of a file of which every byte is read, whatever was read before."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(f"reading {path.name}", path.stat().st_size, BYTES) as shown:
        while block := file.read(BLOCK):
            digest.update(block)
            shown.update(len(block))
    return digest.hexdigest()


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder beside `destination`; it takes that name only when the block ends without an error.

    Raises:
        MachineError: the machine has no room or no memory left, or does not let us write there.

    What an earlier, killed run left beside it is removed first. A rename is the last step, so nobody ever sees half
    a folder under the final name; nor half an old one, which is renamed before it is removed.
    """
    destination = Path(destination).resolve()
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file; give the name of a folder", str(destination))
    partial, old = (destination.with_name(f".{destination.name}.{kind}") for kind in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    with explained(destination):
        partial.mkdir(parents=True)
    try:
        # Inside, while what fills a disk is still there to be counted.
        with explained(destination):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if destination.exists():
        destination.rename(old)
    partial.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let `tempfile` work in `folder`, which is made and removed, for all of this process.

    A process that is killed removes nothing. What lies in TMPDIR would stay there for ever; what lies in the folder of
    a stage goes with that when the stage runs again.
    """
    before, folder = tempfile.tempdir, folder.resolve()
    folder.mkdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_file(destination: Path) -> Iterator[Path]:
    """Yield a path beside `destination` to write to; it takes that name only when the block ends without an error."""
    destination = Path(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with explained(destination.parent):
            destination.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: Path, destination: Path) -> None:
    """A hard link where the file system allows one, else a copy: variants share the files that they have in common."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
