"""What a revision of a repository holds: the files that stages read, with their sizes and hashes.

`hf2mnn pin` writes it to a file, so that files from anywhere can be held to it without the hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.folder import FILES
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import whole_file
from hf2mnn.core.progress import BYTES, progress
from hf2mnn.core.untrusted import read_json

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f\ud800-\udfff]+")
"""A file that could lie in a folder by this name."""
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]*")
"""Names of branches and tags become paths in caches."""
BLOCK = 1 << 20


def needed(name: str, patterns: Sequence[str] = FILES) -> bool:
    """Whether a stage reads a file of this name; what lies in a folder of the repository, none does."""
    return NAME.fullmatch(name) is not None and any(fnmatch(name, pattern) for pattern in patterns)


def check_names(repository: str, *revisions: str) -> None:
    """Raises CheckpointError where one is not written as a hub's repository, or a revision, is."""
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"{repository!r} is not a hub repository: it is written owner/name")
    for revision in revisions:
        if not REVISION.fullmatch(revision):
            raise CheckpointError(f"{revision!r} is not a revision: give a branch, a tag or a commit")


@dataclass(frozen=True)
class Digest:
    """A file's size in bytes and one hash in hex: sha256 of its bytes, or the blob id that git has for it."""

    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def wanted(self) -> str:
        return self.sha256 or self.blob_id

    def of(self, path: Path, name: str) -> str:
        """The hash of a file, of the kind that is wanted; `name` is what it is called here."""
        size = path.stat().st_size
        found = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file, progress(f"checking {name}", size, BYTES) as shown:
            while block := file.read(BLOCK):
                found.update(block)
                shown.update(len(block))
        return found.hexdigest()

    def fault(self, path: Path, name: str) -> str | None:
        """What another file than this, called `name`, has instead, in words; None for this one."""
        size = path.stat().st_size
        if size != self.size:
            return f"{size} bytes instead of {self.size}"
        found = self.of(path, name)
        if found == self.wanted:
            return None
        return f"{'sha256' if self.sha256 else 'git blob id'} {found} instead of {self.wanted}"


@dataclass(frozen=True)
class Pin:
    """A revision of a repository of a hub. `branch` is what was asked for: a branch, a tag, or the commit itself."""

    hub: str
    repository: str
    revision: str
    branch: str
    files: dict[str, Digest]

    def __post_init__(self) -> None:
        """Raises CheckpointError for names that no hub has."""
        check_names(self.repository, self.revision, self.branch)

    def save(self, path: Path) -> None:
        stored = asdict(self)
        for digest in stored["files"].values():
            del digest["blob_id" if digest["sha256"] else "sha256"]
        with whole_file(path) as partial:
            partial.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def _digest(name: str, stored: Any) -> Digest:
    """Raises ValueError for a name that could lead elsewhere, or a hash that is none."""
    digest = Digest(**stored)
    hashed = SHA256.fullmatch(digest.sha256 or "") or COMMIT.fullmatch(digest.blob_id or "")
    if not needed(name) or not hashed or type(digest.size) is not int or digest.size < 0:
        raise ValueError(f"{name!r} has no size and hash")
    return digest


def load_pin(path: Path) -> Pin:
    """Read what `hf2mnn pin --out` has written.

    Raises:
        CheckpointError: there is no such file, or it is something else.
    """
    try:
        stored = read_json(Path(path))
        files = {name: _digest(name, digest) for name, digest in stored.pop("files").items()}
        return Pin(**stored, files=files)
    except FileNotFoundError:
        raise CheckpointError(f"there is no pin {path}: write it with 'hf2mnn pin owner/name --out {path}'") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a pin ({error}); write it again with 'hf2mnn pin --out'") from None
