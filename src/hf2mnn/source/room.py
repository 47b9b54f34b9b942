"""Whether a disk has the room that is needed, asked before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf2mnn.errors import SourceError

SPARE = 1.01
"""A file system needs a little more than the bytes of the files."""


def check_disk(folder: Path, needed: int, what: str) -> None:
    """`needed` bytes are to be written to `folder`, which need not be there yet; `what` names them.

    Raises:
        SourceError: the disk has less than that free.
    """
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed * SPARE:
        raise SourceError(
            f"{what} would take {needed * SPARE / 1e9:.2f} GB in {folder}, and its disk has {free / 1e9:.2f} GB free;"
            " make space, or have the folder on another disk"
        )
