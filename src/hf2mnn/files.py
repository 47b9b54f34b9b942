"""Files and folders that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder beside `destination`; it takes that name only when the block ends without an error.

    What an earlier, killed run left beside it is removed first. A rename is the last step, so nobody ever sees half
    a folder under the final name.
    """
    destination = Path(destination).resolve()
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file; give the name of a folder", str(destination))
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)


@contextmanager
def whole_file(destination: Path) -> Iterator[Path]:
    """Yield a path beside `destination` to write to; it takes that name only when the block ends without an error."""
    destination = Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
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
