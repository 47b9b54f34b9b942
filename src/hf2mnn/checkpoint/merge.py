"""Give a checkpoint's folder of links the weights that an adapter makes of them.

A shard in which nothing changes stays a link. Of another a file of its own is written, tensor after tensor and some
rows at a time: the changed ones as float32, all others byte for byte as they were. float32, because the change is
often smaller than a step of bfloat16, and rounded to that it would be lost in part: what is compared with PyTorch is
the model with its adapter, not a rounding of it. Sums are float64 in one order, so that any machine writes the same
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from hf2mnn.checkpoint.adapter import HEAD, Change, Lora
from hf2mnn.checkpoint.folder import Checkpoint, read_json
from hf2mnn.checkpoint.preflight import INDEX
from hf2mnn.checkpoint.room import check_disk
from hf2mnn.checkpoint.tensors import Layout, StoredTensor, file_header, layout
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import whole_file
from hf2mnn.core.progress import BYTES, Progress, progress

VALUES = 1 << 21
"""Weights that are merged at a time: 8 MB, and twice that while they are summed."""
BLOCK = 1 << 23
"""Bytes that are copied at a time."""


@njit(nogil=True, cache=True, error_model="numpy")
def _add(weight, left, right, scaling, magnitude):
    """float32 [rows, columns]: weight + scaling * (left @ right) of float64 [rows, rank] and [rank, columns]; its rows
    get the lengths `magnitude` where that is not empty. A product of two float32 is exact in float64, so that it is one
    result whether or not a machine adds in the same step.
    """
    rows, columns = weight.shape
    merged = np.empty((rows, columns), np.float32)
    row = np.empty(columns, np.float64)
    for i in range(rows):
        row[:] = 0.0
        for k in range(left.shape[1]):
            factor = left[i, k]
            for j in range(columns):
                row[j] += factor * right[k, j]
        length = 0.0
        for j in range(columns):
            row[j] = weight[i, j] + scaling * row[j]
        if magnitude.size:
            for j in range(columns):
                length += row[j] * row[j]
            factor = magnitude[i] / np.sqrt(length)
            for j in range(columns):
                row[j] *= factor
        for j in range(columns):
            merged[i, j] = row[j]
    return merged


def _all(tensor: StoredTensor) -> np.ndarray:
    return tensor.rows(0, tensor.shape[0])


def _rows(base: StoredTensor, lora: Lora | None, begin: int, end: int, loaded: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [end - begin, ...]: rows of a changed weight."""
    weight = base.rows(begin, end)
    if lora is None:
        return weight
    if lora.embedding:
        left, right = loaded["a"][:, begin:end].T, loaded["b"].T
    else:
        left, right = lora.b.rows(begin, end), loaded["a"]
    magnitude = lora.magnitude.rows(begin, end) if lora.magnitude else np.empty(0, np.float32)
    left, right = (np.ascontiguousarray(part, np.float64) for part in (left, right))
    return _add(weight, left, right, float(lora.scaling), magnitude.astype(np.float64))


def _merged(name: str, base: StoredTensor, lora: Lora | None) -> Iterator[bytes]:
    """A changed tensor's bytes, some rows at a time."""
    loaded = {} if lora is None else {"a": _all(lora.a)} | ({"b": _all(lora.b)} if lora.embedding else {})
    rows = base.shape[0]
    step = max(1, VALUES * rows // max(prod(base.shape), 1))
    for begin in range(0, rows, step):
        made = _rows(base, lora, begin, min(begin + step, rows), loaded)
        if not np.isfinite(made).all():
            raise CheckpointError(
                f"{name} with the adapter holds NaN or infinite numbers: the adapter is not whole, or not of this model"
            )
        yield made.astype("<f4", copy=False).tobytes()


def _copied(path: Path, tensor: Layout) -> Iterator[bytes]:
    """A tensor's bytes as they are."""
    with path.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.size
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise CheckpointError(f"{path} has become shorter while it was read; run the same command again")
            left -= len(block)
            yield block


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file that is to be written. `change` None: as the old file has it."""

    name: str
    old: Layout | None
    base: StoredTensor | None = None
    change: Change | None = None

    @property
    def entry(self) -> tuple[str, str, tuple[int, ...], int]:
        if self.change is None:
            return self.name, self.old.dtype, self.old.shape, self.old.size
        return self.name, "F32", self.base.shape, 4 * prod(self.base.shape)

    def content(self, path: Path) -> Iterator[bytes]:
        return _copied(path, self.old) if self.change is None else _merged(self.name, self.base, self.change.lora)


def _changed(checkpoint: Checkpoint, changes: dict[str, Change]) -> dict[str, dict[str, _Tensor]]:
    """The tensors to write, by shard and by the checkpoint's own name."""
    found: dict[str, dict[str, _Tensor]] = {}
    for parameter, change in changes.items():
        name = checkpoint.find(parameter)
        base, shard = change.replaced or checkpoint.stored(parameter), checkpoint.shards[name]
        if base is None:
            raise CheckpointError(
                f"{shard} holds {name} in a type of numbers to which no adapter is added; save the checkpoint as"
                " float32, float16 or bfloat16"
            )
        if parameter == HEAD:  # from now on it is a tensor of its own, also where it was the embedding
            name, shard = HEAD, checkpoint.shards.get(HEAD, shard)
        # Links are replaced while they are read, and lm_head may be made of another shard's embedding.
        base = replace(base, path=base.path.resolve())
        found.setdefault(shard.name, {})[name] = _Tensor(name, None, base, change)
    return found


def _width(tensor: _Tensor) -> float:
    """Bytes of a number."""
    _, _, shape, size = tensor.entry
    return size / max(prod(shape), 1)


def _write(path: Path, old: Path, tensors: list[_Tensor], shown: Progress) -> None:
    """A shard in place of a link to `old`."""
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(file_header(tensor.entry for tensor in tensors))
        for tensor in tensors:
            for block in tensor.content(old):
                file.write(block)
                shown.update(len(block))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A JSON file in place of a link."""
    content = read_json(path)
    change(content)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def _untie(folder: Path, shard: str) -> None:
    """Say that lm_head, now in `shard`, is no longer the embedding."""

    def config(content: dict[str, Any]) -> None:
        for part in (content, content.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False

    _edit(folder / "config.json", config)
    if (folder / INDEX).exists():
        _edit(folder / INDEX, lambda content: content["weight_map"].update({HEAD: shard}))


def merge(checkpoint: Checkpoint, changes: dict[str, Change], folder: Path) -> dict[str, Path]:
    """Write what changes of `checkpoint` into `folder`, in place of links; gives the files that it was made of, by
    name. Where the embedding and lm_head are one tensor and become two, config.json and the index change as well.

    Raises:
        CheckpointError: the disk is too small, or a changed weight is not finite.
    """
    old = {path.name: path.resolve() for path in checkpoint.shards.values()}
    shards = {}
    for shard, changed in _changed(checkpoint, changes).items():
        kept = {name: _Tensor(name, tensor) for name, tensor in layout(old[shard]).items()}
        # As the library does: wide types first, so that all lie aligned.
        shards[shard] = sorted((kept | changed).values(), key=_width, reverse=True)
    total = sum(tensor.entry[3] for tensors in shards.values() for tensor in tensors)
    check_disk(folder, total, "the weights with the adapter")
    with progress("merging the adapter", total, BYTES) as shown:
        for shard, tensors in sorted(shards.items()):
            _write(folder / shard, old[shard], tensors, shown)
    made_of = {shard: old[shard] for shard in sorted(shards)}
    if checkpoint.tied and HEAD in changes:
        made_of["config.json"] = (checkpoint.folder / "config.json").resolve()
        _untie(folder, next(shard for shard, tensors in shards.items() if any(t.name == HEAD for t in tensors)))
    return made_of
