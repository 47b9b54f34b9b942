"""Read and write safetensors files a few rows at a time, so that no file and no tensor is in memory as a whole.

Format: 8 bytes with the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), the data; offsets
count from the end of the header (github.com/huggingface/safetensors, README). The safetensors library gives no
offsets, which mapped weights need, and its writers need all tensors of a file in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.untrusted import parse_json

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Supported weight dtypes, by their names in safetensors."""
BLOCK = 1 << 21  # bytes that are checked at a time, few enough for a core's cache


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
        if self.dtype == ml_dtypes.bfloat16:  # the upper half of a float32; much faster than astype
            wide = values.view(np.uint16).astype(np.uint32)
            wide <<= 16
            values = wide.view(np.float32)
        return values.astype(np.float32, copy=False).reshape(end - begin, *self.shape[1:])


@dataclass(frozen=True)
class Layout:
    """Header entry of a tensor of any dtype; `offset` from the beginning of the file and `size` are in bytes."""

    path: Path
    dtype: str  # name in safetensors
    shape: tuple[int, ...]
    offset: int
    size: int

    def stored(self) -> StoredTensor | None:
        """Return the tensor, or None if its dtype is not one of `FLOATS`."""
        dtype = FLOATS.get(self.dtype)
        return StoredTensor(self.path, dtype, self.shape, self.offset) if dtype else None


EXPONENTS = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
"""Bits of the exponent in the floating-point dtypes of safetensors; NaN and infinity have all of them."""


def is_finite(tensor: Layout) -> bool:
    """Return whether a tensor of a dtype of `EXPONENTS` has neither NaN nor infinite values."""
    exponent = EXPONENTS[tensor.dtype]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for begin in range(0, tensor.size, BLOCK):
            words = np.fromfile(file, exponent.dtype, min(BLOCK, tensor.size - begin) // exponent.itemsize)
            words &= exponent
            if words.max() == exponent:
                return False
    return True


def layout(path: Path) -> dict[str, Layout]:
    """Return the header entries of all tensors of a file, by name; CheckpointError where they do not match the file."""
    try:
        with safe_open(path, "np"):  # checks that shapes, offsets and the file's size match
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))  # refuses duplicate names
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}); download it again") from None
    return {
        name: Layout(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in header.items()
        if name != "__metadata__"
        for begin, end in [entry["data_offsets"]]
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
