"""ModelScope (MODELSCOPE_ENDPOINT), through its own client and into its own cache.

Its server gives files by branch or tag, not always by commit; the hashes of the pin say whether they are still the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import modelscope_hub._download
from modelscope_hub import HubApi, HubConfig
from modelscope_hub.errors import (
    APIError,
    AuthenticationError,
    FileIntegrityError,
    HubError,
    NetworkError,
    NotExistError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)
from tqdm import tqdm

from hf2mnn.checkpoint.folder import FILES
from hf2mnn.checkpoint.hub.base import AGAIN, BY_HAND, CorruptedError, Position, TransientError
from hf2mnn.checkpoint.hub.pin import SHA256, Digest, Pin, needed
from hf2mnn.core.errors import CheckpointError

LOG_IN = "log in with 'ms login' (or set MODELSCOPE_API_TOKEN)"

# Its bar cannot be turned off, and clutters logs beside ours.
modelscope_hub._download.tqdm = partial(tqdm, disable=True)


def _reason(error: HubError) -> str:
    return " ".join(error.message.split())


@contextmanager
def _told(endpoint: str, repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """The client's errors as sentences. It tries five times itself, so that a person should know at once; not where its
    hour for a file is over.
    """
    what = f"{name} of {repository}" if name else repository
    try:
        yield
    except AuthenticationError:
        raise CheckpointError(f"ModelScope does not know who asks for {what} (401): {LOG_IN}") from None
    except PermissionDeniedError:
        raise CheckpointError(
            f"ModelScope forbids to have {what} (403): accept its terms on its page, or ask its owner for access, and"
            f" {LOG_IN}"
        ) from None
    except NotExistError:
        missing = f"{name} in {repository}" if name else f"repository {repository}"
        raise CheckpointError(
            f"ModelScope has no {missing} at revision {revision!r} (404), or it is private: check both names, or"
            f" {LOG_IN}"
        ) from None
    except RateLimitError as error:
        wait = float(error.retry_after or 0)
        long = f"{wait:.0f} s" if wait else "a few minutes"
        raise TransientError(
            f"ModelScope takes no more requests for now (429): wait {long} and {AGAIN}", at_once=True
        ) from None
    except ServerError as error:
        status = error.status_code or "5xx"
        raise TransientError(
            f"ModelScope failed at {what} ({status}): wait a little and {AGAIN}", at_once=True
        ) from None
    except FileIntegrityError as error:
        raise CorruptedError(f"{what} came as another file ({_reason(error)})") from None
    except NetworkError as error:
        raise TransientError(
            f"{what} could not be downloaded, for {endpoint} cannot be reached or the line was cut"
            f" ({type(error.__cause__ or error).__name__}): look at the network and {AGAIN}, set MODELSCOPE_ENDPOINT"
            f" to a mirror, {BY_HAND}",
            at_once=error.retryable,
        ) from None
    except APIError as error:
        raise CheckpointError(f"ModelScope refuses {what} ({error.status_code}): {_reason(error)}") from None
    except HubError as error:
        raise CheckpointError(f"{what} could not be downloaded ({_reason(error)}): {AGAIN}") from None


class ModelScope:
    default = "master"
    package = "modelscope-hub"

    def __init__(self) -> None:
        self._api = HubApi(HubConfig())
        self._endpoint = self._api.legacy.endpoint

    @property
    def cache(self) -> Path:
        return HubConfig().cache_dir

    def find(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin:
        with _told(self._endpoint, repository, revision):
            # Not the client's typed listing, which leaves out the commits.
            entries = self._api.legacy.list_repo_files(repository, "model", revision)
        entries = [entry for entry in entries if entry.get("Type") != "tree"]
        files = {}
        for entry in entries:
            name, sha256 = entry.get("Path", ""), str(entry.get("Sha256", "")).lower()
            if needed(name, patterns):
                if not SHA256.fullmatch(sha256):
                    raise CheckpointError(
                        f"ModelScope lists {name} of {repository} without sha256; it cannot be checked"
                    )
                files[name] = Digest(int(entry["Size"]), sha256=sha256)
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
        return Pin("modelscope", repository, newest.get("Revision") or revision, revision, files)

    def remembered(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin | None:
        """Its cache keeps no hashes; a pin file does."""
        return None

    def _target(self, pin: Pin, name: str) -> Path:
        owner, _, model = pin.repository.partition("/")
        return self.cache / "models" / f"{owner}--{model}" / "snapshots" / pin.branch / name

    def cached(self, pin: Pin, name: str) -> Path | None:
        path = self._target(pin, name)
        return path if path.exists() else None

    def part(self, pin: Pin, name: str) -> Path:
        path = self._target(pin, name)
        return path.with_name(f"{path.name}.incomplete")

    def download(self, pin: Pin, name: str, shown: Position) -> Path:
        class Callback(modelscope_hub._download.ProgressCallback):
            def __init__(self, filename: str, file_size: int) -> None:
                self._at = 0
                shown.at(0)

            def update(self, size: int) -> None:
                self._at += size
                shown.at(self._at)

        target, digest = self._target(pin, name), pin.files[name]
        with _told(self._endpoint, pin.repository, pin.branch, name):
            return self._api.downloader.download_file(
                pin.repository,
                "model",
                name,
                revision=pin.branch,
                local_dir=target.parent,
                file_size=digest.size,
                expected_sha256=digest.wanted,
                progress_callbacks=[Callback],
            )
