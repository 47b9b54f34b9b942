"""The `source` stage: put a checkpoint's files where the other stages look, and vouch for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hf2mnn.errors import SourceError
from hf2mnn.files import sha256_of
from hf2mnn.manifest import SCRATCH, Manifest, stage_folder, tool_versions
from hf2mnn.source.adapter import Adapter
from hf2mnn.source.checkpoint import ADAPTER_FILES, Checkpoint, checkpoint_files
from hf2mnn.source.hub import gather, hub_named, pin_repository, say
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


@dataclass(frozen=True)
class AdapterPlace:
    """Where a LoRA adapter is: a local folder, or a repository of a hub at a revision (None: the default branch)."""

    path: Path | None = None
    repository: str | None = None
    revision: str | None = None
    hub: str = "huggingface"

    def find(self, scratch: Path) -> tuple[Adapter, dict[str, Any]]:
        """The adapter, and what is to be said of where it came from; a hub's is linked into the folder `scratch`.

        Raises:
            SourceError: there is none.
        """
        if (self.path is None) == (self.repository is None):
            raise SourceError("give either a local folder or a hub repository as the adapter, one of them")
        if self.path is not None:
            if not Path(self.path).is_dir():
                raise SourceError(
                    f"there is no adapter folder {self.path}: give the folder that holds adapter_config.json"
                )
            return Adapter(self.path), {}
        pin = pin_repository(self.repository, self.revision, self.hub, ADAPTER_FILES)
        scratch.mkdir(parents=True)
        _link(gather(hub_named(pin.hub), pin), scratch)
        where = {"hub": pin.hub, "repository": pin.repository, "revision": pin.branch, "commit": pin.revision}
        return Adapter(scratch, pin.repository), where


def fetch_source(
    destination: Path,
    path: Path | None = None,
    repository: str | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    pin: Path | None = None,
    files: Path | None = None,
    adapter: AdapterPlace | None = None,
) -> Path:
    """Link a checkpoint's files into `destination` and write the manifest.

    They are those of a local folder `path`, of a `repository` at a `revision` (None is the hub's default branch), or
    of a `pin` that `hf2mnn pin` has written. Of a hub's, each is held to the size and hash that the hub gives;
    `files` is a folder in which a person has put some, or all, of them. Weights that an `adapter` changes are written
    as they are with it (`hf2mnn.source.merge`).

    Raises:
        SourceError: there is no such checkpoint, it is incomplete, of a family that is not converted, or its parts do
            not fit each other; or so the adapter.
    """
    if [path, repository, pin].count(None) != 2:
        raise SourceError("give either a local folder or a hub repository or a pin as source, not several and not none")
    if path is not None:
        _fetch_folder(destination, Path(path), files, adapter)
    else:
        pinned = load_pin(pin) if pin is not None else pin_repository(repository, revision, hub)
        _fetch_pinned(destination, pinned, files, adapter)
    return destination


def _fetch_folder(destination: Path, path: Path, files: Path | None, adapter: AdapterPlace | None) -> None:
    if files is not None:
        raise SourceError("--files goes with a repository or a pin: files of a local folder are taken as they are")
    if Path(destination).resolve() == path.resolve():
        raise SourceError(f"{destination} is the checkpoint itself; give --out another folder")
    checkpoint = Checkpoint(path)
    check_checkpoint(checkpoint)
    check_room(path, destination)
    manifest = Manifest("source", places={"path": str(path)})
    with stage_folder(destination, manifest) as folder:
        _link({found.name: found for found in map(Path, checkpoint_files(path))}, folder)
        if adapter:
            _adapt(checkpoint, adapter, folder, manifest)


def _fetch_pinned(destination: Path, pin: Pin, files: Path | None, adapter: AdapterPlace | None) -> None:
    hub = hub_named(pin.hub)
    found = gather(hub, pin, files)
    settings = {"hub": pin.hub, "repository": pin.repository, "revision": pin.branch, "commit": pin.revision}
    manifest = Manifest("source", settings=settings, tools=tool_versions(hub.package))
    with stage_folder(destination, manifest) as folder:
        _link(found, folder)
        with _named(folder, pin.repository):
            checkpoint = Checkpoint(folder)
            check_checkpoint(checkpoint)
            check_room(folder, destination)
            if adapter:
                _adapt(checkpoint, adapter, folder, manifest)


def _adapt(checkpoint: Checkpoint, place: AdapterPlace, folder: Path, manifest: Manifest) -> None:
    """Make of the links in `folder` a checkpoint with the adapter, and write both into the manifest."""
    from hf2mnn.source.merge import merge  # loads a compiler, of no use to other sources

    adapter, where = place.find(folder / SCRATCH / "adapter")
    changes = adapter.changes(checkpoint)
    base, given = adapter.settings.base_model, manifest.settings.get("repository") or manifest.places.get("path")
    if base and PurePath(base).name != Path(given).absolute().name:
        say(f"the adapter {adapter.place} says that it was trained on {base}; it is merged into {given}")
    merged = merge(checkpoint, changes, folder)
    with _named(folder, given):
        check_checkpoint(Checkpoint(folder))
    files = _digests(adapter.files())
    manifest.inputs |= {name: file["sha256"] for name, file in files.items()}
    if where:
        manifest.settings["adapter"] = where
    else:
        manifest.places["adapter"] = str(place.path)
    manifest.sources = {
        "adapter": {**where, "base_model": base, "files": files},
        "merged": {"files": _digests(merged)},
    }


def _digests(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, as a manifest's outputs have them."""
    found = sha256_of(files.values())
    return {name: {"size": path.stat().st_size, "sha256": found[path]} for name, path in sorted(files.items())}
