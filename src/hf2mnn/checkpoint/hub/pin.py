"""Pin: the files of a repository's revision that stages read, with their sizes and hashes.

`hf2mnn pin` writes a pin to a file, so that files from any source can be checked without the hub. The hubs' clients
have no such file.
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
from hf2mnn.core.files import CHUNK, atomic_file
from hf2mnn.core.progress import BYTES, progress
from hf2mnn.core.untrusted import read_json

COMMIT = re.compile(r"[0-9a-f]{40}")
HASHES = {"sha256": re.compile(r"[0-9a-f]{64}"), "blob_id": COMMIT}
"""Hashes that hubs list, by kind; a blob id is git's sha1 of a file."""
FILE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f\ud800-\udfff]+")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]*")  # branches and tags become paths in caches


def matches(name: str, patterns: Sequence[str] = FILES) -> bool:
    """Return whether stages read a file of this name; in a subfolder only if a pattern names the subfolder."""
    level = name.count("/")
    return all(map(FILE_NAME.fullmatch, name.split("/"))) and any(
        level == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns
    )


def check_names(repository: str, *revisions: str) -> None:
    """Raise CheckpointError for a malformed repository or revision."""
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"{repository!r} is not a hub repository: write it as owner/name")
    for revision in revisions:
        if not REVISION.fullmatch(revision):
            raise CheckpointError(f"{revision!r} is not a revision: give a branch, a tag or a commit")


@dataclass(frozen=True)
class Digest:
    """Size of a file in bytes, and one of its hashes in hex."""

    size: int
    kind: str  # key of `HASHES`
    expected: str

    def mismatch(self, path: Path, name: str) -> str | None:
        """Return how a file differs from this digest, as text; None if it matches. `name` labels the progress bar."""
        size = path.stat().st_size
        if size != self.size:
            return f"{size} bytes instead of {self.size}"
        digest = hashlib.sha256()
        if self.kind == "blob_id":
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file, progress(f"checking {name}", size, BYTES) as bar:
            while block := file.read(CHUNK):
                digest.update(block)
                bar.update(len(block))
        if digest.hexdigest() == self.expected:
            return None
        kind = self.kind.replace("blob_id", "git blob id")
        return f"{kind} {digest.hexdigest()} instead of {self.expected}"


@dataclass(frozen=True)
class Pin:
    """A revision of a repository on a hub; CheckpointError for a malformed name."""

    hub: str  # "huggingface" or "modelscope"
    repository: str  # owner/name
    revision: str  # commit
    branch: str  # requested branch, tag or commit
    files: dict[str, Digest]  # by file name

    def __post_init__(self) -> None:
        check_names(self.repository, self.revision, self.branch)

    def save(self, path: Path) -> None:
        """Write the pin as JSON."""
        files = {name: {"size": digest.size, digest.kind: digest.expected} for name, digest in self.files.items()}
        stored = asdict(self) | {"files": files}
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def _parse_digest(name: str, size: Any, sha256: str | None = None, blob_id: str | None = None) -> Digest:
    """Raise ValueError for a name that leads out of the folder, or an invalid size or hash."""
    kind, expected = ("sha256", sha256) if sha256 else ("blob_id", blob_id or "")
    if not matches(name) or not HASHES[kind].fullmatch(expected) or type(size) is not int or size < 0:
        raise ValueError(f"{name!r} has no valid size and hash")
    return Digest(size, kind, expected)


def load_pin(path: Path) -> Pin:
    """Read a pin that `hf2mnn pin --out` has written."""
    try:
        stored = read_json(Path(path))
        files = {name: _parse_digest(name, **digest) for name, digest in stored.pop("files").items()}
        return Pin(**stored, files=files)
    except FileNotFoundError:
        raise CheckpointError(f"no pin {path}: write it with 'hf2mnn pin owner/name --out {path}'") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a pin ({error}); write it again with 'hf2mnn pin --out'") from None
