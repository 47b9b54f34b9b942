"""Get the files of a pinned revision: user-provided, from the cache of the hub's client, or downloaded.

Not `snapshot_download` of the clients: it checks no user-provided files, and starts a file again after a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf2mnn.checkpoint.folder import FILES, read_json
from hf2mnn.checkpoint.hub.base import RESUME, USE_FILES, CorruptedError, Hub, Position, TransientError, retry, warn
from hf2mnn.checkpoint.hub.pin import Pin, check_names
from hf2mnn.checkpoint.size import check_disk
from hf2mnn.checkpoint.weight_files import used_files
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.progress import BYTES, progress


def get_hub(name: str) -> Hub:
    """Return the hub of a name; imports its client, which is slow."""
    if name == "huggingface":
        from hf2mnn.checkpoint.hub.huggingface import HuggingFace

        return HuggingFace()
    if name == "modelscope":
        from hf2mnn.checkpoint.hub.modelscope import ModelScope

        return ModelScope()
    raise CheckpointError(f"unknown hub {name!r}; choose one of: huggingface, modelscope")


def pin_repository(
    repository: str, revision: str | None = None, hub: str = "huggingface", patterns: Sequence[str] = FILES
) -> Pin:
    """Return the current commit of a branch or tag of owner/name, with the files that match a pattern.

    Of weights, only the files that transformers loads; config.json and an index of shards are downloaded to know them.
    If the hub cannot be reached, return the commit of the last download. The revision None is the default branch.
    """
    client = get_hub(hub)
    revision = client.default if revision is None else revision
    check_names(repository, revision)
    try:
        pin = retry(lambda: client.find(repository, revision, patterns))
    except TransientError as error:
        pin = client.find_offline(repository, revision, patterns)
        if pin is None:
            raise
        warn(f"{error}; using the last download, commit {pin.revision}")
    if patterns is not FILES:
        return pin

    def read(name: str) -> dict[str, Any]:
        return read_json(_cached(client, pin, name) or _download(client, pin, name))

    return replace(pin, files={name: pin.files[name] for name in used_files(pin.files, read, repository)})


def _user_provided(folder: Path, pin: Pin) -> dict[str, Path]:
    """Return the files of a folder that match the pin; warn about others of the same names."""
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder} with user-provided files; create it, or omit --files")
    files = {}
    for name, digest in pin.files.items():
        path = folder / name
        if path.is_file():
            if mismatch := digest.mismatch(path, name):
                warn(f"ignoring {path}: {mismatch} in {pin.repository} at {pin.revision}")
            else:
                files[name] = path
    return files


def _cached(hub: Hub, pin: Pin, name: str) -> Path | None:
    """Return a file of the cache; remove it there if it does not match the pin."""
    path = next((path for path in hub.paths(pin, name) if path.exists()), None)
    if path and (mismatch := pin.files[name].mismatch(path, name)):
        warn(f"removing {path} from the cache: {mismatch}")
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        return None
    return path


def _download(hub: Hub, pin: Pin, name: str, again: bool = False) -> Path:
    try:
        with progress(f"downloading {name}", pin.files[name].size, BYTES) as bar:
            position = Position(bar)
            return retry(lambda: hub.download(pin, name, position))
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be written to {hub.cache} ({error.strerror or error}): free some space or change"
            f" its permissions, and {RESUME}"
        ) from None
    except CorruptedError as error:
        if again:
            raise CheckpointError(
                f"{error}, twice: the hub, a mirror or a proxy serves another file; reach the hub another way,"
                f" {USE_FILES}"
            ) from None
        warn(f"{error}; downloading it again")
    return _download(hub, pin, name, again=True)


def gather(hub: Hub, pin: Pin, files: Path | None = None) -> dict[str, Path]:
    """Return the paths of all pinned files, each checked against the pin.

    `files` is a folder of user-provided files, preferred to the cache and the hub.
    """
    paths = _user_provided(Path(files), pin) if files else {}
    for name in pin.files:
        if name not in paths and (path := _cached(hub, pin, name)):
            paths[name] = path
    # Small files first: config.json in the cache shows early what is downloaded.
    missing = sorted((name for name in pin.files if name not in paths), key=lambda name: pin.files[name].size)
    parts = [part.stat().st_size for name in missing if (part := hub.part(pin, name)).exists()]
    remaining = sum(pin.files[name].size for name in missing) - sum(parts)
    check_disk(hub.cache, max(remaining, 0), f"the rest of the download of {pin.repository}")
    return paths | {name: _download(hub, pin, name) for name in missing}
