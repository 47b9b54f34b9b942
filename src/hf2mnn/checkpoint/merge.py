"""Merge a LoRA adapter into a checkpoint folder of links.

A shard without changes stays a link. Any other shard is written anew, tensor by tensor and some rows at a time: changed
tensors as float32, all others byte for byte. float32, because a change is often smaller than a rounding step of
bfloat16 and would be lost in part. Sums are float64 in a fixed order, so that every machine writes the same bytes.
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
from hf2mnn.checkpoint.folder import INDEX, Checkpoint, read_json
from hf2mnn.checkpoint.size import check_disk
from hf2mnn.checkpoint.tensors import Layout, StoredTensor, file_header, layout
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import atomic_file
from hf2mnn.core.progress import BYTES, Progress, progress

MERGE_VALUES = 1 << 21
"""Weights merged at a time: 8 MB, and twice that for their float64 sums."""
COPY_BLOCK = 1 << 23
"""Bytes copied at a time."""


@njit(nogil=True, cache=True, error_model="numpy")
def _add(weight, left, right, scaling, magnitude):
    """Return weight + scaling * (left @ right) as float32 [rows, columns].

    A product of two float32 values is exact in float64, so fused multiply-adds give the same result.

    Args:
        weight: float32 [rows, columns].
        left: float64 [rows, rank].
        right: float64 [rank, columns].
        scaling: float64.
        magnitude: New lengths of the rows, float64 [rows]; or empty.
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


def _all_rows(tensor: StoredTensor) -> np.ndarray:
    return tensor.rows(0, tensor.shape[0])


def _merge_rows(
    base: StoredTensor, lora: Lora | None, begin: int, end: int, factors: dict[str, np.ndarray]
) -> np.ndarray:
    """Return rows of a changed weight, float32 [end - begin, ...]; `factors` are those that all rows share."""
    weight = base.rows(begin, end)
    if lora is None:
        return weight
    if lora.embedding:
        left, right = factors["a"][:, begin:end].T, factors["b"].T
    else:
        left, right = lora.b.rows(begin, end), factors["a"]
    magnitude = lora.magnitude.rows(begin, end) if lora.magnitude else np.empty(0, np.float32)
    left, right = (np.ascontiguousarray(factor, np.float64) for factor in (left, right))
    return _add(weight, left, right, float(lora.scaling), magnitude.astype(np.float64))


def _merged_bytes(name: str, base: StoredTensor, lora: Lora | None) -> Iterator[bytes]:
    """Yield the bytes of a changed tensor, some rows at a time."""
    factors = {} if lora is None else {"a": _all_rows(lora.a)} | ({"b": _all_rows(lora.b)} if lora.embedding else {})
    rows = base.shape[0]
    step = max(1, MERGE_VALUES * rows // max(prod(base.shape), 1))
    for begin in range(0, rows, step):
        merged = _merge_rows(base, lora, begin, min(begin + step, rows), factors)
        if not np.isfinite(merged).all():
            raise CheckpointError(
                f"{name} has NaN or infinite values after the merge: the adapter is corrupted or of another model;"
                " download it again"
            )
        yield merged.astype("<f4", copy=False).tobytes()


def _stored_bytes(path: Path, tensor: Layout) -> Iterator[bytes]:
    """Yield the bytes of an unchanged tensor."""
    with path.open("rb") as file:
        file.seek(tensor.offset)
        remaining = tensor.size
        while remaining:
            block = file.read(min(COPY_BLOCK, remaining))
            if not block:
                raise CheckpointError(f"{path} was truncated while it was read; run the same command again")
            remaining -= len(block)
            yield block


@dataclass(frozen=True)
class _Output:
    """A tensor to write.

    Attributes:
        name: Name in the file.
        stored: Entry in the old file of an unchanged tensor; None for a changed one.
        base: Base weight of a changed tensor.
        change: Change of a changed tensor.
    """

    name: str
    stored: Layout | None
    base: StoredTensor | None = None
    change: Change | None = None

    @property
    def entry(self) -> tuple[str, str, tuple[int, ...], int]:
        """Header entry: name, dtype, shape and bytes."""
        if self.stored is not None:
            return self.name, self.stored.dtype, self.stored.shape, self.stored.size
        return self.name, "F32", self.base.shape, 4 * prod(self.base.shape)

    def content(self, path: Path) -> Iterator[bytes]:
        """Yield the bytes of the tensor; `path` is the old file."""
        if self.change is None:
            return _stored_bytes(path, self.stored)
        return _merged_bytes(self.name, self.base, self.change.lora)


def _changed_tensors(checkpoint: Checkpoint, changes: dict[str, Change]) -> dict[str, dict[str, _Output]]:
    """Return the changed tensors by shard and by the checkpoint's own name."""
    shards: dict[str, dict[str, _Output]] = {}
    for parameter, change in changes.items():
        name = checkpoint.find(parameter)
        base, shard = change.replacement or checkpoint.stored(parameter), checkpoint.shards[name]
        if base is None:
            raise CheckpointError(
                f"{shard} holds {name} with a dtype to which no adapter can be added; save the checkpoint as float32,"
                " float16 or bfloat16"
            )
        if parameter == HEAD:  # from now on a tensor of its own, even if it was tied
            name, shard = HEAD, checkpoint.shards.get(HEAD, shard)
        # Resolve now: links are replaced while tensors are read, and lm_head may come from the embedding's shard.
        base = replace(base, path=base.path.resolve())
        shards.setdefault(shard.name, {})[name] = _Output(name, None, base, change)
    return shards


def _item_size(tensor: _Output) -> float:
    _, _, shape, size = tensor.entry
    return size / max(prod(shape), 1)


def _write_shard(path: Path, old: Path, tensors: list[_Output], bar: Progress) -> None:
    """Write a shard in place of the link to `old`."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(file_header(tensor.entry for tensor in tensors))
        for tensor in tensors:
            for block in tensor.content(old):
                file.write(block)
                bar.update(len(block))


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Write an edited JSON file in place of a link."""
    content = read_json(path)
    edit(content)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def _untie(folder: Path, shard: str) -> None:
    """Record that lm_head, now stored in `shard`, is not tied to the embedding."""

    def edit_config(content: dict[str, Any]) -> None:
        for part in (content, content.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False

    _edit_json(folder / "config.json", edit_config)
    if (folder / INDEX).exists():
        _edit_json(folder / INDEX, lambda content: content["weight_map"].update({HEAD: shard}))


def merge(checkpoint: Checkpoint, changes: dict[str, Change], folder: Path) -> dict[str, Path]:
    """Write the changed shards of `checkpoint` into `folder`, in place of links.

    If a tied lm_head becomes a tensor of its own, config.json and the index change as well.

    Returns:
        The original files of all changed ones, by name.

    Raises:
        CheckpointError: The disk is too small, or a merged weight is not finite.
    """
    old = {path.name: path.resolve() for path in checkpoint.shards.values()}
    shards = {}
    for shard, changed in _changed_tensors(checkpoint, changes).items():
        unchanged = {name: _Output(name, tensor) for name, tensor in layout(old[shard]).items()}
        # The order of the safetensors library: wide dtypes first, so that all tensors are aligned.
        shards[shard] = sorted((unchanged | changed).values(), key=_item_size, reverse=True)
    total = sum(tensor.entry[3] for tensors in shards.values() for tensor in tensors)
    check_disk(folder, total, "the merged weights")
    with progress("merging the adapter", total, BYTES) as bar:
        for shard, tensors in sorted(shards.items()):
            _write_shard(folder / shard, old[shard], tensors, bar)
    originals = {shard: old[shard] for shard in sorted(shards)}
    if checkpoint.tied and HEAD in changes:
        originals["config.json"] = (checkpoint.folder / "config.json").resolve()
        _untie(folder, next(shard for shard, tensors in shards.items() if any(t.name == HEAD for t in tensors)))
    return originals
