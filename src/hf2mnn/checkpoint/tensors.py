"""Read and write safetensors files a few rows at a time, so that no file and no tensor is in memory as a whole.

Format: 8 bytes with the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), the data; offsets
count from the end of the header (github.com/huggingface/safetensors, README). The safetensors library gives no
offsets, which mapped weights need, and its writers need all tensors of a file in memory.
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
"""Supported weight dtypes, by their names in safetensors."""
MAX_HEADER = 100_000_000
"""Largest header in bytes that the safetensors library accepts."""


@dataclass(frozen=True)
class StoredTensor:
    """A floating-point tensor in a file; `offset` in bytes counts from the beginning of the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Return rows `begin` to `end` of the first axis, exactly, as float32 [end - begin, ...]."""
        length = prod(self.shape[1:])
        with self.path.open("rb") as file:
            file.seek(self.offset + begin * length * self.dtype.itemsize)
            values = np.fromfile(file, self.dtype, (end - begin) * length)
        return _float32(values).reshape(end - begin, *self.shape[1:])


def _float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == ml_dtypes.bfloat16:  # the upper half of a float32; much faster than astype
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Layout:
    """Header entry of a tensor of any dtype.

    Attributes:
        dtype: Name of the dtype in safetensors.
        shape: Shape.
        offset: First byte, from the beginning of the file.
        size: Size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _is_list_of_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header without metadata, the offset of the data, and its size in bytes.

    Raises:
        ValueError: The file has no valid header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("the header is not an object of tensors")
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _check_header(header: dict[str, Any], size: int) -> None:
    """Raise ValueError where the bytes of a tensor do not match its shape, or overlap those of another."""
    spans = []
    for name, entry in header.items():
        shape, span = entry.get("shape"), entry.get("data_offsets")
        if not _is_list_of_counts(shape) or not _is_list_of_counts(span) or len(span) != 2:
            raise ValueError(f"{name} has no valid shape and data_offsets")
        if not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{name} has no valid dtype")
        dtype = FLOATS.get(entry["dtype"])
        if not span[0] <= span[1] <= size or (dtype and prod(shape) * dtype.itemsize != span[1] - span[0]):
            raise ValueError(f"{name} of shape {shape} has data_offsets {span} in {size} bytes of data")
        spans.append((*span, name))
    spans.sort()
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{first} and {second} share bytes")


def layout(path: Path) -> dict[str, Layout]:
    """Return the header entries of all tensors of a file, by name.

    Raises:
        CheckpointError: The header is invalid or does not match the file.
    """
    try:
        header, start, size = _read_header(path)
        _check_header(header, size)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}); download it again") from None
    return {
        name: Layout(entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file that have a dtype of `FLOATS`, by name.

    Raises:
        CheckpointError: The header is invalid or does not match the file.
    """
    return {
        name: StoredTensor(path, FLOATS[tensor.dtype], tensor.shape, tensor.offset)
        for name, tensor in layout(path).items()
        if tensor.dtype in FLOATS
    }


def file_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the header of a file of these tensors (name, dtype, shape, bytes) in order, padded to align the data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
