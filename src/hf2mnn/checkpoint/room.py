"""Whether there is the room that is needed, asked before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from hf2mnn.checkpoint.size import model_size
from hf2mnn.core.errors import CheckpointError
from hf2mnn.machine.footprint import bundle_bytes
from hf2mnn.machine.memory import available_memory

SPARE = 1.01
"""A file system needs a little more than the bytes of the files."""


def check_disk(folder: Path, needed: int, what: str) -> None:
    """`needed` bytes are to be written to `folder`, which need not be there yet; `what` names them.

    Raises:
        CheckpointError: the disk has less than that free.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed * SPARE:
        raise CheckpointError(
            f"{what} would take {needed * SPARE / 1e9:.2f} GB in {folder}, and its disk has {free / 1e9:.2f} GB free;"
            " make space, or have the folder on another disk"
        )


SMALLEST = 4.5
"""Bits a weight of the smallest bundle that is usual, scales included."""


def check_room(checkpoint: Path, destination: Path, memory_mb: Callable[[float], int]) -> None:
    """Whether one bundle of a checkpoint can be made at all: what evaluation needs beyond that is said before a run.

    Raises:
        CheckpointError: too little disk or memory for this model.
    """
    size = model_size(str(checkpoint), None)
    check_disk(destination, bundle_bytes(size.weights, size.embedding, SMALLEST), "a bundle of 4 bits of this model")
    needed, free = memory_mb(size.weights) / 1e3, available_memory() / 1e9
    if free < needed:
        raise CheckpointError(
            f"converting a model of {size.weights / 1e9:.1f} billion weights takes {needed:.1f} GB of memory, and"
            f" {free:.1f} GB are free; close other programs, or give the job more"
        )
