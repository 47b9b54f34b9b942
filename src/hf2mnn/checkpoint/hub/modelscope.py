"""ModelScope (MODELSCOPE_ENDPOINT), with its own client and cache.

Its server serves files by branch or tag, not always by commit; the hashes of the pin show whether they have changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import modelscope_hub._download
from modelscope_hub import HubApi, HubConfig, errors
from tqdm import tqdm

from hf2mnn.checkpoint.hub.base import RESUME, USE_FILES, CorruptedError, Hub, Position, TransientError, status_error
from hf2mnn.checkpoint.hub.pin import HASHES, Digest, Pin, matches
from hf2mnn.core.errors import CheckpointError

STATUS = {errors.AuthenticationError: 401, errors.PermissionDeniedError: 403, errors.RateLimitError: 429}
"""HTTP statuses of errors that the client also raises for other statuses."""
LOG_IN = "log in with 'ms login' (or set MODELSCOPE_API_TOKEN)"

# The client's own progress bar has no switch, and would be printed beside ours.
modelscope_hub._download.tqdm = partial(tqdm, disable=True)


def _reason(error: errors.HubError) -> str:
    return " ".join(error.message.split())


@contextmanager
def _client_errors(endpoint: str, repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Turn the client's exceptions into CheckpointError.

    The client makes five attempts itself, so errors are reported at once, except after its limit of one hour per file.
    """
    file = f"{name} of {repository}" if name else repository
    try:
        yield
    except errors.NotExistError:
        missing = f"{name} in {repository}" if name else f"repository {repository}"
        raise CheckpointError(
            f"ModelScope has no {missing} at revision {revision!r} (404), or it is private: check both names, or"
            f" {LOG_IN}"
        ) from None
    except errors.FileIntegrityError as error:
        raise CorruptedError(f"{file} is corrupted ({_reason(error)})") from None
    except errors.NetworkError as error:
        raise TransientError(
            f"{file} could not be downloaded: {endpoint} cannot be reached or the connection was interrupted"
            f" ({type(error.__cause__ or error).__name__}); check the network and {RESUME}, set MODELSCOPE_ENDPOINT to"
            f" a mirror, {USE_FILES}",
            report_now=error.retryable,
        ) from None
    except errors.APIError as error:
        status = STATUS.get(type(error)) or error.status_code or (500 if error.retryable else 400)
        wait = float(getattr(error, "retry_after", None) or 0)
        raise status_error("ModelScope", LOG_IN, file, status, _reason(error), wait, report_now=True) from None
    except errors.HubError as error:
        raise CheckpointError(f"{file} could not be downloaded ({_reason(error)}): {RESUME}") from None


class ModelScope(Hub):
    """The `Hub` of ModelScope."""

    default = "master"
    package = "modelscope-hub"

    def __init__(self) -> None:
        self.cache = HubConfig().cache_dir
        self._api = HubApi(HubConfig())
        self._endpoint = self._api.legacy.endpoint

    def find(self, repository: str, revision: str, patterns: Sequence[str]) -> Pin:
        """See `Hub`."""
        with _client_errors(self._endpoint, repository, revision):
            # The client's typed listing omits the commits.
            entries = self._api.legacy.list_repo_files(repository, "model", revision)
        entries, files = [entry for entry in entries if entry.get("Type") != "tree"], {}
        for entry in entries:
            name, sha256 = entry.get("Path", ""), str(entry.get("Sha256", "")).lower()
            if matches(name, patterns):
                if not HASHES["sha256"].fullmatch(sha256):
                    raise CheckpointError(
                        f"ModelScope lists {name} of {repository} without sha256, so it cannot be checked; take the"
                        " repository from another hub"
                    )
                files[name] = Digest(int(entry["Size"]), "sha256", sha256)
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
        return Pin("modelscope", repository, newest.get("Revision") or revision, revision, files)

    def paths(self, pin: Pin, name: str) -> list[Path]:
        """Return the path in the folder of the branch."""
        return [self.cache / "models" / pin.repository.replace("/", "--") / "snapshots" / pin.branch / name]

    def download(self, pin: Pin, name: str, position: Position) -> Path:
        """See `Hub`."""
        with _client_errors(self._endpoint, pin.repository, pin.branch, name):
            return self._api.downloader.download_file(
                pin.repository,
                "model",
                name,
                revision=pin.branch,
                local_dir=self.paths(pin, name)[0].parents[name.count("/")],
                file_size=pin.files[name].size,
                expected_sha256=pin.files[name].expected,
                progress_callbacks=[lambda *_: position.begin()],
            )
