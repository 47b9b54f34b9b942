"""Which files of a checkpoint hold its weights: the one safetensors file or the shards that transformers loads.

The precedence of `_get_resolved_checkpoint_files` (transformers 5.23, modeling_utils.py): `transformers_weights` of
config.json, model.safetensors, model.safetensors.index.json. Not asked from transformers, because a hub's list is not a
folder, and importing it takes seconds at each start of a run; a test compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import PurePath
from typing import Any

from hf2mnn.core.errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHTS, INDICES = ".safetensors", ".safetensors.index.json"  # suffixes
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # suffixes of pickled weights: loading them runs code
Read = Callable[[str], dict[str, Any]]


def convert_pickled(names: Collection[str]) -> str:
    """Return the advice for a checkpoint without safetensors; `names` are its files."""
    pickled = min((name for name in names if name.endswith(PICKLED)), default="pytorch_model.bin")
    return (
        f"download them; pickled weights ({pickled}) can run code and are never read, so convert those that you"
        " trust with transformers'"
        " AutoModelForImageTextToText.from_pretrained(FOLDER, weights_only=True).save_pretrained(NEW)"
    )


def weight_files(names: Collection[str], read: Read, label: object) -> tuple[str | None, list[str]]:
    """Return the index, or None, and the safetensors files that hold the weights, sorted.

    `names` are the files of a checkpoint, `read` returns one of its JSON files, and `label` names the checkpoint in
    errors. CheckpointError where transformers finds no weights, or an index is invalid.
    """
    explicit = read(CONFIG).get("transformers_weights") if CONFIG in names else None
    chosen = explicit if explicit is not None else next((name for name in (SINGLE, INDEX) if name in names), None)
    if chosen is None:
        others = sorted(name for name in names if name.endswith(WEIGHTS))
        if not others:
            raise CheckpointError(f"{label} has no *{WEIGHTS}: {convert_pickled(names)}")
        raise CheckpointError(
            f"{label} has {others[0]}, but transformers loads {SINGLE} or the files of {INDEX}; give it that name, or"
            " download the index"
        )
    if not isinstance(chosen, str) or chosen not in names or not chosen.endswith((WEIGHTS, INDICES)):
        raise CheckpointError(
            f"{CONFIG} of {label} has transformers_weights {chosen!r}, which is no safetensors file or index of its"
            " folder; download it again"
        )
    if not chosen.endswith(INDICES):
        return None, [chosen]
    weight_map, index = read(chosen).get("weight_map"), f"{label}/{chosen}"
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map; download it again")
    files = sorted(set(weight_map.values()))
    for name in files:
        if name.endswith(PICKLED):
            raise CheckpointError(f"{index} names {name}, not a safetensors file: {convert_pickled([name])}")
        if not name.endswith(WEIGHTS) or name != PurePath(name).name:
            raise CheckpointError(
                f"{index} names {name[:80]!r}, not a safetensors file of its folder; download it again"
            )
    if not files:
        raise CheckpointError(f"{index} names no file; download it again")
    return chosen, files


def used_files(names: Collection[str], read: Read, label: object) -> list[str]:
    """Return `names` without the weights and indices that transformers does not load, sorted."""
    index, weights = weight_files(names, read, label)
    kept = {index, *weights}
    return sorted(name for name in names if not name.endswith((WEIGHTS, INDICES)) or name in kept)
