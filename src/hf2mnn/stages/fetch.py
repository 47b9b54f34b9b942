"""fetch: a checkpoint from a folder or a hub, checked before the first computation.

Reads a local folder, a repository of a hub or a pin, and optionally a LoRA adapter to merge.
Writes links to the checkpoint's files, and the weights that an adapter changes.
"""

from __future__ import annotations

from pathlib import Path

from hf2mnn.checkpoint.fetch import AdapterSource, link_files, merge_adapter, rename_in_errors
from hf2mnn.checkpoint.folder import Checkpoint, checkpoint_files
from hf2mnn.checkpoint.hub.download import gather, get_hub, pin_repository
from hf2mnn.checkpoint.hub.pin import Pin, load_pin
from hf2mnn.checkpoint.preflight import check_checkpoint
from hf2mnn.checkpoint.size import check_resources
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.stage import Stage, open_stage
from hf2mnn.machine.footprint import Footprint
from hf2mnn.stages import conversion_memory_mb

STAGE = Stage("fetch", tools=("torch", "transformers", "numba"), footprint=Footprint(700, 0, 240, 30))


def run(
    destination: Path,
    path: Path | None = None,
    repository: str | None = None,
    revision: str | None = None,
    hub: str = "huggingface",
    pin: Path | None = None,
    files: Path | None = None,
    adapter: AdapterSource | None = None,
) -> Path:
    """Link the files of a checkpoint into `destination`; each file of a hub is checked by its size and hash.

    Raises:
        CheckpointError: The checkpoint or adapter is missing, incomplete, inconsistent or of an unsupported family.
    """
    if [path, repository, pin].count(None) != 2:
        raise CheckpointError("give exactly one of --path (a local folder), --repository (on a hub) and --pin (a file)")
    if path is not None:
        _fetch_folder(destination, Path(path), files, adapter)
    else:
        pinned = load_pin(pin) if pin is not None else pin_repository(repository, revision, hub)
        _fetch_pinned(destination, pinned, files, adapter)
    return destination


def _fetch_folder(destination: Path, path: Path, files: Path | None, adapter: AdapterSource | None) -> None:
    if files is not None:
        raise CheckpointError("--files is only for a repository or a pin: leave it out for a local folder")
    if Path(destination).resolve() == path.resolve():
        raise CheckpointError(f"{destination} is the checkpoint itself; give --out another folder")
    checkpoint = Checkpoint(path)
    check_checkpoint(checkpoint)
    check_resources(path, destination, conversion_memory_mb)
    with open_stage(STAGE, destination, paths={"path": path}, tools=()) as stage:
        link_files({file.name: file for file in map(Path, checkpoint_files(path))}, stage.folder)
        if adapter:
            merge_adapter(checkpoint, adapter, stage.folder, stage.manifest)


def _fetch_pinned(destination: Path, pin: Pin, files: Path | None, adapter: AdapterSource | None) -> None:
    hub = get_hub(pin.hub)
    paths = gather(hub, pin, files)
    settings = {"hub": pin.hub, "repository": pin.repository, "revision": pin.branch, "commit": pin.revision}
    with open_stage(STAGE, destination, settings=settings, tools=(hub.package,)) as stage:
        link_files(paths, stage.folder)
        with rename_in_errors(stage.folder, pin.repository):
            checkpoint = Checkpoint(stage.folder)
            check_checkpoint(checkpoint)
            check_resources(stage.folder, destination, conversion_memory_mb)
            if adapter:
                merge_adapter(checkpoint, adapter, stage.folder, stage.manifest)
