"""The `source` stage: put a checkpoint's files where the other stages look, and vouch for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf2mnn.errors import SourceError
from hf2mnn.manifest import Manifest, stage_folder, tool_versions
from hf2mnn.source.checkpoint import Checkpoint, checkpoint_files
from hf2mnn.source.hub import gather, hub_named, pin_repository
from hf2mnn.source.pin import Pin, load_pin
from hf2mnn.source.preflight import check_checkpoint
from hf2mnn.source.room import check_room


def _link(files: dict[str, Path], folder: Path) -> None:
    for name, path in sorted(files.items()):
        (folder / name).symlink_to(path.resolve())


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Errors name what a person has given, not the folder of links beside the final one."""
    try:
        yield
    except SourceError as error:
        raise SourceError(str(error).replace(str(folder), name)) from None


def fetch_source(
    destination: Path,
    path: Path | None = None,
    repository: str | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    pin: Path | None = None,
    files: Path | None = None,
) -> Path:
    """Link a checkpoint's files into `destination` and write the manifest.

    They are those of a local folder `path`, of a `repository` at a `revision` (None is the hub's default branch), or
    of a `pin` that `hf2mnn pin` has written. Of a hub's, each is held to the size and hash that the hub gives;
    `files` is a folder in which a person has put some, or all, of them.

    Raises:
        SourceError: there is no such checkpoint, it is incomplete, of a family that is not converted, or its parts do
            not fit each other.
    """
    if [path, repository, pin].count(None) != 2:
        raise SourceError("give either a local folder or a hub repository or a pin as source, not several and not none")
    if path is not None:
        _fetch_folder(destination, Path(path), files)
    else:
        pinned = load_pin(pin) if pin is not None else pin_repository(repository, revision, hub)
        _fetch_pinned(destination, pinned, files)
    return destination


def _fetch_folder(destination: Path, path: Path, files: Path | None) -> None:
    if files is not None:
        raise SourceError("--files goes with a repository or a pin: files of a local folder are taken as they are")
    if Path(destination).resolve() == path.resolve():
        raise SourceError(f"{destination} is the checkpoint itself; give --out another folder")
    check_checkpoint(Checkpoint(path))
    check_room(path, destination)
    manifest = Manifest("source", places={"path": str(path)})
    with stage_folder(destination, manifest) as folder:
        _link({found.name: found for found in map(Path, checkpoint_files(path))}, folder)


def _fetch_pinned(destination: Path, pin: Pin, files: Path | None) -> None:
    hub = hub_named(pin.hub)
    found = gather(hub, pin, files)
    settings = {"hub": pin.hub, "repository": pin.repository, "revision": pin.branch, "commit": pin.revision}
    manifest = Manifest("source", settings=settings, tools=tool_versions(hub.package))
    with stage_folder(destination, manifest) as folder:
        _link(found, folder)
        with _named(folder, pin.repository):
            check_checkpoint(Checkpoint(folder))
            check_room(folder, destination)
