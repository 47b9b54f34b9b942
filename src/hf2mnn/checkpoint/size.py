"""Size of a model before it is fetched, and the disk and memory that it needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.hub.pin import load_pin
from hf2mnn.checkpoint.prequantized import QWEIGHT
from hf2mnn.core.errors import CheckpointError
from hf2mnn.machine.footprint import TYPICAL_WEIGHTS, bundle_bytes
from hf2mnn.machine.hardware import available_memory

DISK_MARGIN = 1.01  # file systems need slightly more than the bytes of the files
SMALLEST_BUNDLE_BITS = 4.5  # bits per weight of the smallest common bundle: 4-bit weights and their scales


@dataclass(frozen=True)
class Size:
    """Number of weights of a model, in total and of the embedding."""

    weights: float
    embedding: float
    known: bool = True  # False where the numbers are those of a typical model


UNKNOWN = Size(TYPICAL_WEIGHTS, TYPICAL_WEIGHTS / 10, known=False)


def _size_of_folder(folder: Path) -> Size:
    checkpoint, weights = Checkpoint(folder), 0
    for name, tensor in checkpoint.headers.items():
        bit_packed = checkpoint.quantization and name.endswith(QWEIGHT)
        weights += prod(tensor.shape) * (32 // checkpoint.quantization.bits if bit_packed else 1)
    text = checkpoint.text_config  # as stored: transformers' own settings would take seconds
    return Size(float(weights), float(text["vocab_size"] * text["hidden_size"]))


def model_size(path: str | None, pin: str | None) -> Size:
    """Return the size of a local checkpoint (from its headers) or a pinned one (from its file sizes).

    An invalid checkpoint has the size `UNKNOWN`; the fetch stage reports what is wrong with it.
    """
    with suppress(CheckpointError, OSError, ValueError, KeyError, TypeError):
        if path and Path(path).is_dir():
            return _size_of_folder(Path(path))
        files = load_pin(Path(pin)).files if pin else {}
        if shards := [digest.size for name, digest in files.items() if name.endswith(".safetensors")]:
            return Size(sum(shards) / 2, 0.0)
    return UNKNOWN


def check_disk(folder: Path, size: int, content: str) -> None:
    """Check that `size` bytes fit on the disk of `folder`, which need not exist yet; `content` names the bytes."""
    absolute = Path(folder).absolute()
    free = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    if free < size * DISK_MARGIN:
        raise CheckpointError(
            f"{content} needs {size * DISK_MARGIN / 1e9:.2f} GB in {folder}, and its disk has {free / 1e9:.2f} GB free;"
            " free some space, or use a folder on another disk"
        )


def check_resources(checkpoint: Path, destination: Path, memory_mb: Callable[[float], int]) -> None:
    """Check that disk and memory suffice for one bundle; a run checks what evaluation needs beyond that.

    `memory_mb` returns the memory of a conversion by the number of weights.
    """
    size = model_size(str(checkpoint), None)
    bundle = bundle_bytes(size.weights, size.embedding, SMALLEST_BUNDLE_BITS)
    check_disk(destination, bundle, "a 4-bit bundle of this model")
    memory, free = memory_mb(size.weights) / 1e3, available_memory() / 1e9
    if free < memory:
        raise CheckpointError(
            f"converting a model of {size.weights / 1e9:.1f} billion weights needs {memory:.1f} GB of memory, and"
            f" {free:.1f} GB are free; close other programs, or give the job more memory"
        )
