"""ModelScope (MODELSCOPE_ENDPOINT), with its own client and cache.

Its server serves files by branch or tag, not always by commit; the hashes of the pin show whether they have changed.
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
from hf2mnn.checkpoint.hub.base import RESUME, USE_FILES, CorruptedError, Position, TransientError
from hf2mnn.checkpoint.hub.pin import SHA256, Digest, Pin, matches
from hf2mnn.core.errors import CheckpointError

LOG_IN = "log in with 'ms login' (or set MODELSCOPE_API_TOKEN)"

# The client's own progress bar has no switch, and would be printed beside ours.
modelscope_hub._download.tqdm = partial(tqdm, disable=True)


def _reason(error: HubError) -> str:
    return " ".join(error.message.split())


@contextmanager
def _client_errors(endpoint: str, repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Turn the client's exceptions into CheckpointError.

    The client makes five attempts itself, so errors are reported at once, except after its limit of one hour per file.
    """
    file = f"{name} of {repository}" if name else repository
    try:
        yield
    except AuthenticationError:
        raise CheckpointError(f"ModelScope requires a login for {file} (401): {LOG_IN}") from None
    except PermissionDeniedError:
        raise CheckpointError(
            f"ModelScope denies access to {file} (403): accept its terms on its page, or ask its owner for access, and"
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
        duration = f"{wait:.0f} s" if wait else "a few minutes"
        raise TransientError(
            f"ModelScope limits the rate of requests (429): wait {duration} and {RESUME}", report_now=True
        ) from None
    except ServerError as error:
        status = error.status_code or "5xx"
        raise TransientError(
            f"ModelScope failed to serve {file} ({status}): wait a little and {RESUME}", report_now=True
        ) from None
    except FileIntegrityError as error:
        raise CorruptedError(f"{file} is corrupted ({_reason(error)})") from None
    except NetworkError as error:
        raise TransientError(
            f"{file} could not be downloaded: {endpoint} cannot be reached or the connection was interrupted"
            f" ({type(error.__cause__ or error).__name__}); check the network and {RESUME}, set MODELSCOPE_ENDPOINT to"
            f" a mirror, {USE_FILES}",
            report_now=error.retryable,
        ) from None
    except APIError as error:
        raise CheckpointError(f"ModelScope refuses {file} ({error.status_code}): {_reason(error)}") from None
    except HubError as error:
        raise CheckpointError(f"{file} could not be downloaded ({_reason(error)}): {RESUME}") from None


class ModelScope:
    """The `Hub` of ModelScope."""

    default = "master"
    package = "modelscope-hub"

    def __init__(self) -> None:
        self._api = HubApi(HubConfig())
        self._endpoint = self._api.legacy.endpoint

    @property
    def cache(self) -> Path:
        """See `Hub`."""
        return HubConfig().cache_dir

    def find(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin:
        """See `Hub`."""
        with _client_errors(self._endpoint, repository, revision):
            # The client's typed listing omits the commits.
            entries = self._api.legacy.list_repo_files(repository, "model", revision)
        entries = [entry for entry in entries if entry.get("Type") != "tree"]
        files = {}
        for entry in entries:
            name, sha256 = entry.get("Path", ""), str(entry.get("Sha256", "")).lower()
            if matches(name, patterns):
                if not SHA256.fullmatch(sha256):
                    raise CheckpointError(
                        f"ModelScope lists {name} of {repository} without sha256, so it cannot be checked; take the"
                        " repository from another hub"
                    )
                files[name] = Digest(int(entry["Size"]), sha256=sha256)
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
        return Pin("modelscope", repository, newest.get("Revision") or revision, revision, files)

    def find_offline(self, repository: str, revision: str, patterns: Sequence[str] = FILES) -> Pin | None:
        """Return None: the client's cache has no hashes."""
        return None

    def _target(self, pin: Pin, name: str) -> Path:
        owner, _, model = pin.repository.partition("/")
        return self.cache / "models" / f"{owner}--{model}" / "snapshots" / pin.branch / name

    def cached(self, pin: Pin, name: str) -> Path | None:
        """See `Hub`."""
        path = self._target(pin, name)
        return path if path.exists() else None

    def part(self, pin: Pin, name: str) -> Path:
        """See `Hub`."""
        path = self._target(pin, name)
        return path.with_name(f"{path.name}.incomplete")

    def download(self, pin: Pin, name: str, position: Position) -> Path:
        """See `Hub`."""

        class Callback(modelscope_hub._download.ProgressCallback):
            def __init__(self, filename: str, file_size: int) -> None:
                self._position = 0
                position.set(0)

            def update(self, size: int) -> None:
                self._position += size
                position.set(self._position)

        target, digest = self._target(pin, name), pin.files[name]
        with _client_errors(self._endpoint, pin.repository, pin.branch, name):
            return self._api.downloader.download_file(
                pin.repository,
                "model",
                name,
                revision=pin.branch,
                local_dir=target.parent,
                file_size=digest.size,
                expected_sha256=digest.expected,
                progress_callbacks=[Callback],
            )
