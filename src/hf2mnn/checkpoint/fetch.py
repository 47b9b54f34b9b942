"""Assemble a checkpoint folder: links to its files, and the weights that a LoRA adapter changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hf2mnn.checkpoint.adapter import Adapter
from hf2mnn.checkpoint.folder import ADAPTER_FILES, Checkpoint
from hf2mnn.checkpoint.hub.base import warn
from hf2mnn.checkpoint.hub.download import gather, get_hub, pin_repository
from hf2mnn.checkpoint.preflight import check_checkpoint
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import sha256_of
from hf2mnn.core.manifest import SCRATCH, Manifest


def link_files(files: dict[str, Path], folder: Path) -> None:
    """Link files into a folder by the given names, which may name a subfolder."""
    for name, path in sorted(files.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(path.resolve())


@contextmanager
def rename_in_errors(folder: Path, name: str) -> Iterator[None]:
    """Replace the temporary `folder` in CheckpointError messages by the name that the user has given."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), name)) from None


@dataclass(frozen=True)
class AdapterSource:
    """Local folder of a LoRA adapter, or its repository (owner/name) on a hub."""

    path: Path | None = None
    repository: str | None = None
    revision: str | None = None  # branch, tag or commit; None for the default branch
    hub: str = "huggingface"

    def open(self, scratch: Path) -> tuple[Adapter, dict[str, Any]]:
        """Return the adapter, and its origin on a hub or {}; downloaded files are linked into `scratch`."""
        if (self.path is None) == (self.repository is None):
            raise CheckpointError("give exactly one of a local folder and a hub repository as the adapter")
        if self.path is not None:
            if not Path(self.path).is_dir():
                raise CheckpointError(f"no adapter folder {self.path}: give the folder that holds adapter_config.json")
            return Adapter(self.path), {}
        pin = pin_repository(self.repository, self.revision, self.hub, ADAPTER_FILES)
        scratch.mkdir(parents=True)
        link_files(gather(get_hub(pin.hub), pin), scratch)
        origin = {"hub": pin.hub, "repository": pin.repository, "revision": pin.branch, "commit": pin.revision}
        return Adapter(scratch, pin.repository), origin


def merge_adapter(checkpoint: Checkpoint, source: AdapterSource, folder: Path, manifest: Manifest) -> None:
    """Merge an adapter into the checkpoint of links in `folder`, and record both in the manifest."""
    from hf2mnn.checkpoint.merge import merge  # loads numba, which is slow

    adapter, origin = source.open(folder / SCRATCH / "adapter")
    changes = adapter.changes(checkpoint)
    base = adapter.settings.get("base_model_name_or_path")
    given = manifest.settings.get("repository") or manifest.paths.get("path")
    if base and PurePath(base).name != Path(given).absolute().name:
        warn(f"the adapter {adapter.name} names {base} as its base model; it is merged into {given}")
    merged = merge(checkpoint, changes, folder)
    with rename_in_errors(folder, given):
        check_checkpoint(Checkpoint(folder))
    files = _digests({name: adapter.folder / name for name in ADAPTER_FILES})
    manifest.inputs |= {name: file["sha256"] for name, file in files.items()}
    if origin:
        manifest.settings["adapter"] = origin
    else:
        manifest.paths["adapter"] = str(source.path)
    manifest.provenance = {
        "adapter": {**origin, "base_model": base, "files": files},
        "merged": {"files": _digests(merged)},
    }


def _digests(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of files, as in the outputs of a manifest."""
    digests = sha256_of(files.values())
    return {name: {"size": path.stat().st_size, "sha256": digests[path]} for name, path in sorted(files.items())}
