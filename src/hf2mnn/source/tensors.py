"""Tensors of a safetensors file, read a few rows at a time: neither the file nor a tensor is ever in memory as a whole.

The format: 8 bytes with the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), the data;
offsets count from the end of the header (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types in which a checkpoint's weights are read."""


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


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a type that is read, by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, described in header.items():
        if described.get("dtype") in FLOATS:
            offset = 8 + length + described["data_offsets"][0]
            found[name] = StoredTensor(path, FLOATS[described["dtype"]], tuple(described["shape"]), offset)
    return found
