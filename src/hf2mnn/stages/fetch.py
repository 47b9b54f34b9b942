"""fetch: a local folder, a hub's repository or a pin -> links to the checkpoint, merged weights of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.options import AdapterHub, Hub, Out, Revision
from hf2mnn.core.stage import Footprint, Stage, open_stage
from hf2mnn.stages import conversion_memory_mb

STAGE = Stage("fetch", tools=("torch", "transformers", "numba"), footprint=Footprint(900, 0, 240, 30))


def run(
    destination: Out,
    path: Annotated[Path | None, typer.Option(help="Local checkpoint folder.")] = None,
    repository: Annotated[str | None, typer.Option(help="owner/name on a hub.")] = None,
    revision: Revision = None,
    hub: Hub = "huggingface",
    pin: Annotated[Path | None, typer.Option(help="File of 'hf2mnn pin', in place of repository and revision.")] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder of user-provided files: those that match are used and not downloaded.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder with a LoRA adapter (PEFT) to merge.")] = None,
    adapter_repository: Annotated[str | None, typer.Option(help="owner/name of an adapter on a hub.")] = None,
    adapter_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the adapter.")] = None,
    adapter_hub: AdapterHub = "huggingface",
) -> Path:
    """Fetch and check a checkpoint, and merge an adapter into it if one is given.

    Example: hf2mnn fetch --path models/shapes-vl --out results/shapes-vl/checkpoint
    """
    from hf2mnn.checkpoint.fetch import AdapterSource, link_files, merge_adapter, rename_in_errors
    from hf2mnn.checkpoint.folder import Checkpoint, checkpoint_files
    from hf2mnn.checkpoint.hub.download import gather, get_hub, pin_repository
    from hf2mnn.checkpoint.hub.pin import load_pin

    if [path, repository, pin].count(None) != 2:
        raise CheckpointError("give exactly one of --path (a local folder), --repository (on a hub) and --pin (a file)")
    if path is not None:
        if files is not None:
            raise CheckpointError("--files is only for a repository or a pin: leave it out for a local folder")
        if destination.resolve() == path.resolve():
            raise CheckpointError(f"{destination} is the checkpoint itself; give --out another folder")
        _check(path, destination)
        name, links = str(path), {str(Path(file).relative_to(path)): Path(file) for file in checkpoint_files(path)}
        described = {"paths": {"path": path}, "tools": ()}
    else:
        chosen = load_pin(pin) if pin is not None else pin_repository(repository, revision, hub)
        source = get_hub(chosen.hub)
        name, links = chosen.repository, gather(source, chosen, files)
        settings = {"hub": chosen.hub, "repository": name, "revision": chosen.branch, "commit": chosen.revision}
        described = {"settings": settings, "tools": (source.package,)}
    with open_stage(STAGE, destination, **described) as stage:
        link_files(links, stage.folder)
        with rename_in_errors(stage.folder, name):
            if path is None:
                _check(stage.folder, destination)
            if adapter is not None or adapter_repository is not None:
                origin = AdapterSource(adapter, adapter_repository, adapter_revision, adapter_hub)
                merge_adapter(Checkpoint(path or stage.folder), origin, stage.folder, stage.manifest)
    return destination


def _check(folder: Path, destination: Path) -> None:
    from hf2mnn.checkpoint.folder import Checkpoint
    from hf2mnn.checkpoint.preflight import check_checkpoint
    from hf2mnn.checkpoint.size import check_resources
    from hf2mnn.mnn.tokenizer import encode_tokenizer

    check_checkpoint(Checkpoint(folder))
    encode_tokenizer(folder)  # refuses what the engine cannot read, before anything is computed
    check_resources(folder, destination, conversion_memory_mb)
