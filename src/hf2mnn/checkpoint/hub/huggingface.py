"""The Hugging Face hub and its mirrors (HF_ENDPOINT), with its own client and cache.

The client's `snapshot_download` starts a file again after its process was killed, with and without Xet. The function
below it, `http_get`, resumes, so it is called directly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from hf2mnn.checkpoint.folder import FILES, read_json
from hf2mnn.checkpoint.hub.base import RESUME, USE_FILES, CorruptedError, Hub, Position, TransientError, status_error
from hf2mnn.checkpoint.hub.pin import COMMIT, HASHES, Digest, Pin, matches
from hf2mnn.checkpoint.weight_files import weight_files
from hf2mnn.core.errors import CheckpointError, first_line

REQUIRED = ("config.json", "tokenizer.json")
"""Files without which an earlier download counts as incomplete."""
LOG_IN = "log in with 'hf auth login' (or set HF_TOKEN)"


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")


@contextmanager
def _client_errors(repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Turn the client's exceptions into CheckpointError."""
    file = f"{name} of {repository}" if name else repository
    messages = {
        errors.GatedRepoError: f"{repository} is gated: accept its terms on its page of the hub, and {LOG_IN};"
        f" {RESUME}",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision!r}: give a branch, a tag or a commit",
        errors.RemoteEntryNotFoundError: f"{repository} no longer has {name} at {revision}: pin it again",
        errors.RepositoryNotFoundError: f"the hub has no repository {repository}, or it is private and you are not"
        f" logged in: check the name, or {LOG_IN}",
        errors.HFValidationError: f"{repository!r} is not a hub repository: write it as owner/name",
    }  # subclasses before their bases
    try:
        yield
    except tuple(messages) as error:
        raise CheckpointError(next(text for kind, text in messages.items() if isinstance(error, kind))) from None
    except errors.HfHubHTTPError as error:
        wait = error.response.headers.get("Retry-After", "")
        wait = float(wait) if wait.isdigit() else 0.0
        raise status_error("the hub", LOG_IN, file, error.response.status_code, _reason(error), wait) from None
    except errors.OfflineModeIsEnabled:
        raise TransientError(
            f"{file} is not in the cache and HF_HUB_OFFLINE disables downloads: unset it, {USE_FILES}", report_now=True
        ) from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol) as error:
        raise TransientError(
            f"{file} could not be downloaded: the hub at {constants.ENDPOINT} cannot be reached ({_reason(error)});"
            f" check the network and {RESUME}, set HF_ENDPOINT to a mirror, {USE_FILES}",
            report_now=True,
        ) from None
    except httpx2.TransportError as error:
        raise TransientError(
            f"{file} could not be downloaded: the connection was interrupted ({_reason(error)}); {RESUME}"
        ) from None


class HuggingFace(Hub):
    """The `Hub` of Hugging Face."""

    default = "main"
    package = "huggingface_hub"
    part_suffix = ".part.incomplete"

    def __init__(self) -> None:
        self.cache = Path(constants.HF_HUB_CACHE)

    def _folder(self, repository: str) -> Path:
        return self.cache / repo_folder_name(repo_id=repository, repo_type="model")

    def find(self, repository: str, revision: str, patterns: Sequence[str]) -> Pin:
        """See `Hub`."""
        with _client_errors(repository, revision):
            info = HfApi().model_info(
                repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        files = {}
        for entry in info.siblings or []:
            if not matches(entry.rfilename, patterns):
                continue
            if entry.size is None or not (entry.lfs or entry.blob_id):
                raise CheckpointError(
                    f"{constants.ENDPOINT} lists {entry.rfilename} of {repository} without size and hash, so it cannot"
                    " be checked; set HF_ENDPOINT to another mirror, or give --pin"
                )
            if entry.lfs:
                files[entry.rfilename] = Digest(entry.lfs.size, "sha256", entry.lfs.sha256)
            else:
                files[entry.rfilename] = Digest(entry.size, "blob_id", entry.blob_id)
        return Pin("huggingface", repository, info.sha, revision, files)

    def find_offline(self, repository: str, revision: str, patterns: Sequence[str]) -> Pin | None:
        """Return the pin from the client's cache, which names files by their hashes and has a folder per commit."""
        folder, commit, files, required = self._folder(repository), revision, {}, {*patterns}
        if not COMMIT.fullmatch(revision):
            ref = folder / "refs" / revision
            if not ref.is_file():
                return None
            commit = ref.read_text().strip()
        snapshot = folder / "snapshots" / commit
        for link in snapshot.rglob("*"):
            name = link.relative_to(snapshot).as_posix()
            if matches(name, patterns) and link.exists():
                blob = link.resolve().name
                kind = next((kind for kind, pattern in HASHES.items() if pattern.fullmatch(blob)), None)
                if kind is None:
                    return None
                files[name] = Digest(link.stat().st_size, kind, blob)
        required = set(patterns)
        if patterns is FILES:
            try:
                required = {*REQUIRED, *weight_files(files, lambda name: read_json(snapshot / name), repository)[1]}
            except CheckpointError:
                return None
        return Pin("huggingface", repository, commit, revision, files) if required <= files.keys() else None

    def paths(self, pin: Pin, name: str) -> list[Path]:
        """Return the paths of the blob and of its link by commit."""
        folder = self._folder(pin.repository)
        return [folder / "blobs" / pin.files[name].expected, folder / "snapshots" / pin.revision / name]

    def download(self, pin: Pin, name: str, position: Position) -> Path:
        """See `Hub`."""
        blob, link = self.paths(pin, name)
        part, digest, folder = self.part(pin, name), pin.files[name], self._folder(pin.repository)
        lock = self.cache / ".locks" / folder.name / f"{digest.expected}.lock"
        for path in (part, lock, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():  # another process may have downloaded it
                self._resume(pin, name, part, position)
                if mismatch := digest.mismatch(part, name):
                    part.unlink()
                    raise CorruptedError(f"{name} of {pin.repository} has {mismatch}")
                part.rename(blob)
        # Link the blob by commit, and the commit by branch, as the client does to find them again.
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        if pin.branch != pin.revision:
            ref = folder / "refs" / pin.branch
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(pin.revision)
        return blob

    def _resume(self, pin: Pin, name: str, part: Path, position: Position) -> None:
        size = pin.files[name].size
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            start = part.stat().st_size
            position.begin(start)
            try:
                with _client_errors(pin.repository, pin.revision, name):
                    http_get(
                        hf_hub_url(pin.repository, name, revision=pin.revision),
                        file,
                        resume_size=start,
                        headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                        expected_size=size,
                        displayed_filename=name,
                        tqdm_class=lambda initial, **_: position.begin(initial),
                    )
            except OSError as error:
                if error.errno is not None:
                    raise
                # The client raises it for a file of another length; `download` checks one that is too long.
                file.flush()
                if part.stat().st_size < size:
                    raise TransientError(
                        f"{name} of {pin.repository} could not be downloaded: the connection was interrupted after"
                        f" {part.stat().st_size} of {size} bytes; {RESUME}"
                    ) from None
