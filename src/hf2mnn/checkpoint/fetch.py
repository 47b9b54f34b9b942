"""Assemble a checkpoint folder: links to its files, and the weights that a LoRA adapter changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hf2mnn.checkpoint.adapter import Adapter
from hf2mnn.checkpoint.folder import ADAPTER_FILES, Checkpoint
from hf2mnn.checkpoint.hub.base import gather, hub_named, pin_repository, say
from hf2mnn.checkpoint.preflight import check_checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import sha256_of
from hf2mnn.core.manifest import SCRATCH, Manifest


def link_files(files: dict[str, Path], folder: Path) -> None:
    """Link files into a folder, by the names that they get there."""
    for name, path in sorted(files.items()):
        (folder / name).symlink_to(path.resolve())


@contextmanager
def errors_name(folder: Path, name: str) -> Iterator[None]:
    """Errors name what a person has given, not the folder of links beside the final one."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), name)) from None


@dataclass(frozen=True)
class AdapterSource:
    """Where a LoRA adapter is: a local folder, or a repository of a hub at a revision (None: the default branch)."""

    path: Path | None = None
    repository: str | None = None
    revision: str | None = None
    hub: str = "huggingface"

    def find(self, scratch: Path) -> tuple[Adapter, dict[str, Any]]:
        """The adapter, and what is to be said of where it came from; a hub's is linked into the folder `scratch`.

        Raises:
            CheckpointError: there is none.
        """
        if (self.path is None) == (self.repository is None):
            raise CheckpointError("give either a local folder or a hub repository as the adapter, one of them")
        if self.path is not None:
            if not Path(self.path).is_dir():
                raise CheckpointError(
                    f"there is no adapter folder {self.path}: give the folder that holds adapter_config.json"
                )
            return Adapter(self.path), {}
        pin = pin_repository(self.repository, self.revision, self.hub, ADAPTER_FILES)
        scratch.mkdir(parents=True)
        link_files(gather(hub_named(pin.hub), pin), scratch)
        where = {"hub": pin.hub, "repository": pin.repository, "revision": pin.branch, "commit": pin.revision}
        return Adapter(scratch, pin.repository), where


def merge_adapter(checkpoint: Checkpoint, source: AdapterSource, folder: Path, manifest: Manifest) -> None:
    """Make of the links in `folder` a checkpoint with the adapter, and write both into the manifest."""
    from hf2mnn.checkpoint.merge import merge  # loads a compiler, of no use to other sources

    adapter, where = source.find(folder / SCRATCH / "adapter")
    changes = adapter.changes(checkpoint)
    base, given = adapter.settings.base_model, manifest.settings.get("repository") or manifest.paths.get("path")
    if base and PurePath(base).name != Path(given).absolute().name:
        say(f"the adapter {adapter.place} says that it was trained on {base}; it is merged into {given}")
    merged = merge(checkpoint, changes, folder)
    with errors_name(folder, given):
        check_checkpoint(Checkpoint(folder))
    files = _digests(adapter.files())
    manifest.inputs |= {name: file["sha256"] for name, file in files.items()}
    if where:
        manifest.settings["adapter"] = where
    else:
        manifest.paths["adapter"] = str(source.path)
    manifest.provenance = {
        "adapter": {**where, "base_model": base, "files": files},
        "merged": {"files": _digests(merged)},
    }


def _digests(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, as a manifest's outputs have them."""
    found = sha256_of(files.values())
    return {name: {"size": path.stat().st_size, "sha256": found[path]} for name, path in sorted(files.items())}
