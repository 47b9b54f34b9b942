"""Atomic files and folders, and sha256 of files."""

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

from hf2mnn.core.machine_errors import machine_errors
from hf2mnn.core.progress import BYTES, progress

CHUNK = 1 << 20  # bytes to read at a time
LARGE = 100_000_000  # bytes from which on the sha256 of a file is remembered
PARALLEL_FILES = 4  # files to hash at the same time
_remembered: dict[tuple[int, ...], str] = {}  # sha256 of large files by device and state


def user_path(path: str | Path) -> Path:
    """Return a path that a user gives, with ~ or ~user at its beginning expanded; an unknown user's stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises for an unknown user


def file_state(path: Path) -> list[int]:
    """Return inode, size in bytes and modification time in ns: they change when a file is written or replaced."""
    state = path.stat()
    return [state.st_ino, state.st_size, state.st_mtime_ns]


def _key(path: Path) -> tuple[int, ...]:
    return (path.stat().st_dev, *file_state(path))


def remember_sha256(path: Path, digest: str) -> None:
    """Let `sha256` return `digest` for a file while its state is the present one."""
    _remembered[_key(path)] = digest


def sha256(path: Path) -> str:
    """Return the hex digest of a file; a large file is read once in a process, unless its state changes."""
    size, key = path.stat().st_size, _key(path)
    digest = _remembered.get(key) or read_sha256(path)
    if size >= LARGE:
        _remembered[key] = digest
    return digest


def sha256_of(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the hex digests of several files, hashed in parallel."""
    paths = list(paths)
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))


def read_sha256(path: Path) -> str:
    """Return the hex digest of a file after reading every byte of it, and show progress."""
    digest = hashlib.sha256()
    with path.open("rb") as file, progress(f"reading {path.name}", path.stat().st_size, BYTES) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder beside `destination`, and rename it to `destination` when the block succeeds.

    Remains of a killed run are removed first. The rename is the last step, so no incomplete folder ever has the final
    name. An existing folder is renamed before it is removed, for the same reason.
    Raise NotADirectoryError if `destination` is a file, MachineError if disk or memory is full or access is denied.
    """
    destination = Path(destination).resolve()
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file; give the name of a folder", str(destination))
    partial, old = (destination.with_name(f".{destination.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with machine_errors(destination):
        partial.mkdir(parents=True)
    try:
        # Inside the try: the message counts the free space before the folder is removed.
        with machine_errors(destination):
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
    """Let `tempfile` use `folder`, which is created and removed, in this process.

    A killed process removes nothing: its files in TMPDIR stay forever, those in a stage folder go with the next run.
    """
    previous, folder = tempfile.tempdir, folder.resolve()
    folder.mkdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = previous
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_file(destination: Path) -> Iterator[Path]:
    """Yield a path beside `destination` to write to, and rename it to `destination` when the block succeeds."""
    destination = Path(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        with machine_errors(destination.parent):
            destination.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


def link_or_copy(source: Path, destination: Path) -> None:
    """Create a hard link where the file system allows one, else a copy, so that variants share common files."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
