"""The Hugging Face hub and its mirrors (HF_ENDPOINT), through its own client and into its own cache.

The client's `snapshot_download` begins a file anew when its process was killed, with Xet as without, so files are
fetched by the function beneath it, which goes on where a part ends.
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
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from hf2mnn.checkpoint.folder import FILES, read_json
from hf2mnn.checkpoint.hub.base import AGAIN, BY_HAND, CorruptedError, Position, TransientError
from hf2mnn.checkpoint.hub.pin import COMMIT, SHA256, Digest, Pin, needed
from hf2mnn.core.errors import CheckpointError

WHOLE = ("config.json", "preprocessor_config.json", "tokenizer.json")
LOG_IN = "log in with 'hf auth login' (or set HF_TOKEN)"


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _status(error: HfHubHTTPError, repository: str, what: str) -> CheckpointError:
    """The sentence of an answer that is none of the client's named errors."""
    status = error.response.status_code
    if status == 401:
        return CheckpointError(f"the hub does not know who asks for {what} (401): {LOG_IN}")
    if status == 403:
        return CheckpointError(
            f"the hub forbids this account to have {what} (403): ask the owner of {repository} for access, or {LOG_IN}"
            " as another"
        )
    if status == 429:
        asked = error.response.headers.get("Retry-After", "")
        wait = float(asked) if asked.isdigit() else 0.0
        long = f"{wait:.0f} s" if wait else "a few minutes"
        return TransientError(
            f"the hub takes no more requests for now (429): wait {long} and {AGAIN}; to have more, {LOG_IN}", wait
        )
    if status >= 500:
        return TransientError(f"the hub failed at {what} ({status}): wait a little and {AGAIN}")
    return CheckpointError(f"the hub refuses {what} ({status}): {_reason(error)}")


@contextmanager
def _told(repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """The client's errors as sentences."""
    what = f"{name} of {repository}" if name else repository
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on its page of the hub, and {LOG_IN}; {AGAIN}"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repository} has no revision {revision!r}: give a branch, a tag or a commit") from None
    except RemoteEntryNotFoundError:
        raise CheckpointError(f"{repository} has no {name} at {revision} any more: pin it again") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"the hub has no repository {repository}, or it is private and you are not logged in: check the name, or"
            f" {LOG_IN}"
        ) from None
    except HFValidationError:
        raise CheckpointError(f"{repository!r} is not a hub repository: it is written owner/name") from None
    except HfHubHTTPError as error:
        raise _status(error, repository, what) from None
    except OfflineModeIsEnabled:
        raise TransientError(
            f"{what} is not here and HF_HUB_OFFLINE forbids to ask the hub: take that away, {BY_HAND}", at_once=True
        ) from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol) as error:
        raise TransientError(
            f"{what} could not be downloaded, for the hub at {constants.ENDPOINT} cannot be reached ({_reason(error)}):"
            f" look at the network and {AGAIN}, set HF_ENDPOINT to a mirror, {BY_HAND}",
            at_once=True,
        ) from None
    except httpx2.TransportError as error:
        raise TransientError(
            f"{what} could not be downloaded, for the line was cut ({_reason(error)}): {AGAIN}"
        ) from None


class _Bar:
    """What the client takes for a progress bar."""

    def __init__(self, position: Position, initial: int) -> None:
        self._position, self._at = position, initial
        position.at(initial)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: int) -> None:
        self._at += n
        self._position.at(self._at)


class HuggingFace:
    default = "main"
    package = "huggingface_hub"

    @property
    def cache(self) -> Path:
        return Path(constants.HF_HUB_CACHE)

    def _folder(self, repository: str) -> Path:
        return self.cache / "--".join(["models", *repository.split("/")])

    def find(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin:
        with _told(repository, revision):
            info = HfApi().model_info(
                repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        files = {}
        for entry in info.siblings or []:
            if not needed(entry.rfilename, patterns):
                continue
            if entry.size is None or not (entry.lfs or entry.blob_id):
                raise CheckpointError(
                    f"{constants.ENDPOINT} lists {entry.rfilename} of {repository} without size and hash, so that it"
                    " cannot be checked; set HF_ENDPOINT to another mirror, or give --pin"
                )
            if entry.lfs:
                files[entry.rfilename] = Digest(entry.lfs.size, sha256=entry.lfs.sha256)
            else:
                files[entry.rfilename] = Digest(entry.size, blob_id=entry.blob_id)
        return Pin("huggingface", repository, info.sha, revision, files)

    def remembered(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin | None:
        """By the client's cache: its files are named by their hashes, and hang on commits."""
        folder, commit = self._folder(repository), revision
        if not COMMIT.fullmatch(revision):
            known = folder / "refs" / revision
            commit = known.read_text().strip() if known.is_file() else ""
        files = {}
        for link in (folder / "snapshots" / commit).glob("*") if commit else []:
            if needed(link.name, patterns) and link.exists():
                hashed = link.resolve().name
                kind = "sha256" if SHA256.fullmatch(hashed) else "blob_id" if COMMIT.fullmatch(hashed) else None
                if kind is None:
                    return None
                files[link.name] = Digest(link.stat().st_size, **{kind: hashed})
        wanted = set(WHOLE if patterns is FILES else patterns)
        if "model.safetensors.index.json" in files:
            index = read_json(folder / "snapshots" / commit / "model.safetensors.index.json")
            wanted |= set(index.get("weight_map", {}).values())
        elif not any(name.endswith(".safetensors") for name in files):
            return None
        return Pin("huggingface", repository, commit, revision, files) if wanted <= files.keys() else None

    def _blob(self, pin: Pin, name: str) -> Path:
        return self._folder(pin.repository) / "blobs" / pin.files[name].wanted

    def cached(self, pin: Pin, name: str) -> Path | None:
        link = self._folder(pin.repository) / "snapshots" / pin.revision / name
        return next((path for path in (self._blob(pin, name), link) if path.exists()), None)

    def part(self, pin: Pin, name: str) -> Path:
        blob = self._blob(pin, name)
        return blob.with_name(f"{blob.name}.part.incomplete")

    def download(self, pin: Pin, name: str, shown: Position) -> Path:
        part, digest = self.part(pin, name), pin.files[name]
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = self.cache / ".locks" / self._folder(pin.repository).name / f"{digest.wanted}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not self._blob(pin, name).exists():  # another process may have been faster
                self._go_on(pin, name, part, shown)
                fault = digest.fault(part, name)
                if fault:
                    part.unlink()
                    raise CorruptedError(f"{name} of {pin.repository} came with {fault}")
                part.rename(self._blob(pin, name))
        self._link(pin, name)
        return self._blob(pin, name)

    def _go_on(self, pin: Pin, name: str, part: Path, shown: Position) -> None:
        size = pin.files[name].size
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            start = file.tell() if part.stat().st_size else 0
            shown.at(start)
            try:
                with _told(pin.repository, pin.revision, name):
                    http_get(
                        hf_hub_url(pin.repository, name, revision=pin.revision),
                        file,
                        resume_size=start,
                        headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                        expected_size=size,
                        displayed_filename=name,
                        tqdm_class=lambda initial, **_: _Bar(shown, initial),
                    )
            except OSError as error:
                if error.errno is not None:
                    raise
                # The client's word for a file that ended too early, or too late, which its check will say.
                file.flush()
                if part.stat().st_size < size:
                    raise TransientError(
                        f"{name} of {pin.repository} could not be downloaded, for the line was cut after"
                        f" {part.stat().st_size} of {size} bytes: {AGAIN}"
                    ) from None

    def _link(self, pin: Pin, name: str) -> None:
        """As the client does: what it has not to fetch again is found by commit, and the commit by the branch."""
        folder = self._folder(pin.repository)
        link = folder / "snapshots" / pin.revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(self._blob(pin, name), link.parent))
        if pin.branch != pin.revision:
            known = folder / "refs" / pin.branch
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(pin.revision)
