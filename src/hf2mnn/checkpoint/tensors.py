"""Tensors of a safetensors file, read a few rows at a time: neither the file nor a tensor is ever in memory as a whole.

The format: 8 bytes with the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), the data;
offsets count from the end of the header (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import parse_json

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types in which a checkpoint's weights are read."""
MOST_HEADER = 100_000_000
"""Bytes of a header that the library takes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the beginning of the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, begin: int, end: int) -> np.ndarray:
        """float32 [rows, ...] from `begin` up to `end` on the first axis, exactly."""
        row = prod(self.shape[1:])
        with self.path.open("rb") as file:
            file.seek(self.offset + begin * row * self.dtype.itemsize)
            found = np.fromfile(file, self.dtype, (end - begin) * row)
        return _float32(found).reshape(end - begin, *self.shape[1:])


def _float32(values: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    if values.dtype == ml_dtypes.bfloat16:
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Layout:
    """A tensor of any type as a file has it: `dtype` as the format writes it, `offset` from the beginning of the file
    and `size` in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _whole(numbers: Any) -> bool:
    """Whether it is a list of whole numbers, none of them negative."""
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _described(path: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header without its metadata, where the data begins, and how many bytes there are.

    Raises:
        ValueError: it is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER, size - 8):
            raise ValueError(f"its header should have {length} bytes, and the file has {size}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("its header is no list of tensors")
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _check_places(header: dict[str, Any], size: int) -> None:
    """Raises ValueError where a tensor is not the bytes that its shape asks for, or shares them with another."""
    places = []
    for name, entry in header.items():
        shape, place = entry.get("shape"), entry.get("data_offsets")
        if not _whole(shape) or not _whole(place) or len(place) != 2:
            raise ValueError(f"{name} has no shape and place")
        if not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{name} has no type")
        dtype = FLOATS.get(entry["dtype"])
        if not place[0] <= place[1] <= size or (dtype and prod(shape) * dtype.itemsize != place[1] - place[0]):
            raise ValueError(f"{name} of shape {shape} is said to lie at {place} of {size} bytes")
        places.append((*place, name))
    places.sort()
    for (_, end, first), (begin, _, second) in pairwise(places):
        if begin < end:
            raise ValueError(f"{first} and {second} share bytes")


def layout(path: Path) -> dict[str, Layout]:
    """Every tensor of a file by name.

    Raises:
        CheckpointError: the header is not one, or does not fit the file.
    """
    try:
        header, start, size = _described(path)
        _check_places(header, size)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    return {
        name: Layout(entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a type that is read, by name.

    Raises:
        CheckpointError: the header is not one, or does not fit the file.
    """
    return {
        name: StoredTensor(path, FLOATS[tensor.dtype], tensor.shape, tensor.offset)
        for name, tensor in layout(path).items()
        if tensor.dtype in FLOATS
    }


def file_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """What a file of these tensors, (name, type, shape, bytes) in their order, begins with. It is padded so that the
    data lie aligned. The library's own writers want all tensors of a file in memory.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
