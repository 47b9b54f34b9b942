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
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from hf2mnn.checkpoint.folder import FILES, INDEX, read_json
from hf2mnn.checkpoint.hub.base import RESUME, USE_FILES, CorruptedError, Position, TransientError
from hf2mnn.checkpoint.hub.pin import COMMIT, SHA256, Digest, Pin, matches
from hf2mnn.core.errors import CheckpointError

REQUIRED = ("config.json", "preprocessor_config.json", "tokenizer.json")
"""Files without which an earlier download counts as incomplete."""
LOG_IN = "log in with 'hf auth login' (or set HF_TOKEN)"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _status_error(error: HfHubHTTPError, repository: str, file: str) -> CheckpointError:
    """Return the error of an HTTP status that the client has no exception for."""
    status = error.response.status_code
    if status == 401:
        return CheckpointError(f"the hub requires a login for {file} (401): {LOG_IN}")
    if status == 403:
        return CheckpointError(
            f"the hub denies this account access to {file} (403): ask the owner of {repository} for access, or"
            f" {LOG_IN} with another account"
        )
    if status == 429:
        header = error.response.headers.get("Retry-After", "")
        wait = float(header) if header.isdigit() else 0.0
        duration = f"{wait:.0f} s" if wait else "a few minutes"
        return TransientError(
            f"the hub limits the rate of requests (429): wait {duration} and {RESUME}; for a higher limit, {LOG_IN}",
            wait,
        )
    if status >= 500:
        return TransientError(f"the hub failed to serve {file} ({status}): wait a little and {RESUME}")
    return CheckpointError(f"the hub refuses {file} ({status}): {_reason(error)}")


@contextmanager
def _client_errors(repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Turn the client's exceptions into CheckpointError."""
    file = f"{name} of {repository}" if name else repository
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on its page of the hub, and {LOG_IN}; {RESUME}"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repository} has no revision {revision!r}: give a branch, a tag or a commit") from None
    except RemoteEntryNotFoundError:
        raise CheckpointError(f"{repository} no longer has {name} at {revision}: pin it again") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no repository {repository}, or it is private and you are not logged in: check the name, or"
            f" {LOG_IN}"
        ) from None
    except HFValidationError:
        raise CheckpointError(f"{repository!r} is not a hub repository: write it as owner/name") from None
    except HfHubHTTPError as error:
        raise _status_error(error, repository, file) from None
    except OfflineModeIsEnabled:
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


class _Bar:
    """Progress bar in the interface that the client expects."""

    def __init__(self, position: Position, initial: int) -> None:
        self._target, self._position = position, initial
        position.set(initial)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: int) -> None:
        self._position += n
        self._target.set(self._position)


class HuggingFace:
    """The `Hub` of Hugging Face."""

    default = "main"
    package = "huggingface_hub"

    @property
    def cache(self) -> Path:
        """See `Hub`."""
        return Path(constants.HF_HUB_CACHE)

    def _folder(self, repository: str) -> Path:
        return self.cache / repo_folder_name(repo_id=repository, repo_type="model")

    def find(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin:
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
                files[entry.rfilename] = Digest(entry.lfs.size, sha256=entry.lfs.sha256)
            else:
                files[entry.rfilename] = Digest(entry.size, blob_id=entry.blob_id)
        return Pin("huggingface", repository, info.sha, revision, files)

    def find_offline(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin | None:
        """Return the pin from the client's cache, which names files by their hashes and has a folder per commit."""
        folder, commit = self._folder(repository), revision
        if not COMMIT.fullmatch(revision):
            ref = folder / "refs" / revision
            commit = ref.read_text().strip() if ref.is_file() else ""
        files = {}
        for link in (folder / "snapshots" / commit).glob("*") if commit else []:
            if matches(link.name, patterns) and link.exists():
                blob = link.resolve().name
                kind = "sha256" if SHA256.fullmatch(blob) else "blob_id" if COMMIT.fullmatch(blob) else None
                if kind is None:
                    return None
                files[link.name] = Digest(link.stat().st_size, **{kind: blob})
        required = set(REQUIRED if patterns is FILES else patterns)
        if INDEX in files:
            required |= set(read_json(folder / "snapshots" / commit / INDEX).get("weight_map", {}).values())
        elif not any(name.endswith(".safetensors") for name in files):
            return None
        return Pin("huggingface", repository, commit, revision, files) if required <= files.keys() else None

    def _blob(self, pin: Pin, name: str) -> Path:
        return self._folder(pin.repository) / "blobs" / pin.files[name].expected

    def cached(self, pin: Pin, name: str) -> Path | None:
        """See `Hub`."""
        link = self._folder(pin.repository) / "snapshots" / pin.revision / name
        return next((path for path in (self._blob(pin, name), link) if path.exists()), None)

    def part(self, pin: Pin, name: str) -> Path:
        """See `Hub`."""
        blob = self._blob(pin, name)
        return blob.with_name(f"{blob.name}.part.incomplete")

    def download(self, pin: Pin, name: str, position: Position) -> Path:
        """See `Hub`."""
        part, digest = self.part(pin, name), pin.files[name]
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = self.cache / ".locks" / self._folder(pin.repository).name / f"{digest.expected}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not self._blob(pin, name).exists():  # another process may have downloaded it
                self._resume(pin, name, part, position)
                mismatch = digest.mismatch(part, name)
                if mismatch:
                    part.unlink()
                    raise CorruptedError(f"{name} of {pin.repository} has {mismatch}")
                part.rename(self._blob(pin, name))
        self._link(pin, name)
        return self._blob(pin, name)

    def _resume(self, pin: Pin, name: str, part: Path, position: Position) -> None:
        size = pin.files[name].size
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            start = file.tell() if part.stat().st_size else 0
            position.set(start)
            try:
                with _client_errors(pin.repository, pin.revision, name):
                    http_get(
                        hf_hub_url(pin.repository, name, revision=pin.revision),
                        file,
                        resume_size=start,
                        headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                        expected_size=size,
                        displayed_filename=name,
                        tqdm_class=lambda initial, **_: _Bar(position, initial),
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

    def _link(self, pin: Pin, name: str) -> None:
        """Link a blob by commit, and the commit by branch, as the client does to find them again."""
        folder = self._folder(pin.repository)
        link = folder / "snapshots" / pin.revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(self._blob(pin, name), link.parent))
        if pin.branch != pin.revision:
            ref = folder / "refs" / pin.branch
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(pin.revision)
