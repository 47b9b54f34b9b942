"""The `source` stage: put a checkpoint's files where the other stages look, and vouch for them."""

from __future__ import annotations

import re
from pathlib import Path

from hf2mnn.errors import SourceError
from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.source.checkpoint import FILES, Checkpoint

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def download(repository: str, revision: str) -> Path:
    """A snapshot in the hub client's own cache (resumed where it stopped, shared by all models); only FILES.

    Raises:
        SourceError: the hub has no such repository or revision, wants a login, or cannot be reached.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except GatedRepoError:
        raise SourceError(
            f"{repository} is gated: accept its terms on the hub and log in with 'hf auth login'"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{repository} has no revision {revision!r}: give a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"the hub has no repository {repository}, or it is private and you are not logged in"
        ) from None
    except HFValidationError:
        raise SourceError(f"{repository!r} is not a hub repository: it is written owner/name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, httpx2.TransportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{repository} could not be downloaded ({reason}); run the same command again to resume"
        ) from None


def fetch_source(
    destination: Path, path: Path | None = None, repository: str | None = None, revision: str = "main"
) -> Path:
    """Link the files of a local folder, or of a downloaded snapshot, into `destination` and write the manifest.

    Raises:
        SourceError: there is no such checkpoint, it is incomplete, or of a family that is not converted.
    """
    if (path is None) == (repository is None):
        raise SourceError("give either a local folder or a hub repository as source, not both and not neither")
    if repository is not None and not REPOSITORY.fullmatch(repository):
        raise SourceError(f"{repository!r} is not a hub repository: it is written owner/name")
    where = Path(path) if path is not None else download(repository, revision)
    if Path(destination).resolve() == where.resolve():
        raise SourceError(f"{destination} is the checkpoint itself; give --out another folder")
    checkpoint = Checkpoint(where)
    checkpoint.check()
    # A snapshot's folder is named after its commit; "main" is not a revision that one can come back to.
    hub = {"repository": repository, "revision": revision, "commit": where.name}
    settings = {"path": str(path)} if path is not None else hub
    manifest = Manifest("source", settings=settings, tools=tool_versions("huggingface_hub"))
    with stage_folder(destination, manifest) as folder:
        for name in sorted({found.name for pattern in FILES for found in where.glob(pattern)}):
            (folder / name).symlink_to((where / name).resolve())
    return destination
