"""Merge a LoRA adapter into a checkpoint folder of links.

A shard without changes stays a link. Any other shard is written anew, tensor by tensor and some rows at a time: changed
tensors as float32, all others byte for byte. float32, because a change is often smaller than a rounding step of
bfloat16 and would be lost in part. Sums are float64 in a fixed order, so that every machine writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from hf2mnn.checkpoint.adapter import Change, Lora
from hf2mnn.checkpoint.folder import HEAD, Checkpoint, read_json
from hf2mnn.checkpoint.size import check_disk
from hf2mnn.checkpoint.tensors import Layout, StoredTensor, file_header, layout
from hf2mnn.core.errors import CheckpointError
from hf2mnn.core.files import atomic_file
from hf2mnn.core.progress import BYTES, progress

MERGE_VALUES = 1 << 21  # weights merged at a time: 8 MB, and twice that for their float64 sums
COPY_BLOCK = 1 << 23  # bytes copied at a time


@njit(nogil=True, cache=True, error_model="numpy")
def _add(weight, left, right, scaling, magnitude):
    """Return weight + scaling * (left @ right) as float32 [rows, columns], the shape of the float32 `weight`.

    left [rows, rank], right [rank, columns] and magnitude, the new lengths of the rows or empty, are float64. A product
    of two float32 values is exact in float64, so fused multiply-adds give the same result.
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


def _merged_bytes(name: str, base: StoredTensor, lora: Lora | None) -> Iterator[bytes]:
    """Yield the bytes of a changed tensor, some rows at a time."""
    rows = base.shape[0]
    step = max(1, MERGE_VALUES * rows // max(prod(base.shape), 1))
    a, b = (factor.rows(0, factor.shape[0]) for factor in (lora.a, lora.b)) if lora else (None, None)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        merged = base.rows(begin, end)
        if lora:
            factors = (a[:, begin:end].T, b.T) if lora.embedding else (b[begin:end], a)
            left, right = (np.ascontiguousarray(factor, np.float64) for factor in factors)
            magnitude = lora.magnitude.rows(begin, end) if lora.magnitude else np.empty(0)
            merged = _add(merged, left, right, float(lora.scaling), magnitude.astype(np.float64))
        if not np.isfinite(merged).all():
            raise CheckpointError(
                f"{name} has NaN or infinite values after the merge: the adapter is corrupted or of another model;"
                " download it again"
            )
        yield merged.astype("<f4", copy=False).tobytes()


def _stored_bytes(tensor: Layout) -> Iterator[bytes]:
    """Yield the bytes of an unchanged tensor."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for begin in range(0, tensor.size, COPY_BLOCK):
            length = min(COPY_BLOCK, tensor.size - begin)
            block = file.read(length)
            if len(block) < length:
                raise CheckpointError(f"{tensor.path} was truncated while it was read; run the same command again")
            yield block


class _Output(NamedTuple):
    """A tensor to write; the dtype has its name in safetensors, the size is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    content: Iterator[bytes]


def _changed_tensors(checkpoint: Checkpoint, changes: dict[str, Change]) -> dict[str, dict[str, _Output]]:
    """Return the changed tensors by shard and by the checkpoint's own name."""
    shards: dict[str, dict[str, _Output]] = {}
    for parameter, change in changes.items():
        name = checkpoint.find(parameter)
        base, shard = change.replacement or checkpoint.stored(parameter), checkpoint.headers[name].path
        if base is None:
            raise CheckpointError(
                f"{shard} holds {name} with a dtype to which no adapter can be added; save the checkpoint as float32,"
                " float16 or bfloat16"
            )
        if parameter == HEAD:  # from now on a tensor of its own, even if it was tied
            name, shard = HEAD, checkpoint.headers[HEAD].path if HEAD in checkpoint.headers else shard
        # Resolve now: links are replaced while tensors are read, and lm_head may come from the embedding's shard.
        base = replace(base, path=base.path.resolve())
        content = _merged_bytes(name, base, change.lora)
        shards.setdefault(shard.name, {})[name] = _Output(name, "F32", base.shape, 4 * prod(base.shape), content)
    return shards


def _untie(folder: Path) -> None:
    """Record that lm_head, now a tensor of its own, is not tied to the embedding."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    with atomic_file(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def merge(checkpoint: Checkpoint, changes: dict[str, Change], folder: Path) -> dict[str, Path]:
    """Write the changed shards of `checkpoint` into `folder`, in place of links; return the original files by name.

    If a tied lm_head becomes a tensor of its own, config.json changes as well. Raise CheckpointError if
    the disk is too small, or a merged weight is not finite.
    """
    old = {path.name: path.resolve() for path in {tensor.path for tensor in checkpoint.headers.values()}}
    shards = {}
    for shard, changed in _changed_tensors(checkpoint, changes).items():
        unchanged = {
            name: _Output(name, tensor.dtype, tensor.shape, tensor.size, _stored_bytes(tensor))
            for name, tensor in layout(old[shard]).items()
        }
        # The order of the safetensors library: wide dtypes first, so that all tensors are aligned.
        tensors = (unchanged | changed).values()
        shards[shard] = sorted(tensors, key=lambda tensor: tensor.size / max(prod(tensor.shape), 1), reverse=True)
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    check_disk(folder, total, "the merged weights")
    with progress("merging the adapter", total, BYTES) as bar:
        for shard, tensors in sorted(shards.items()):
            with atomic_file(folder / shard) as partial, partial.open("wb") as file:
                file.write(file_header(tensor[:4] for tensor in tensors))
                for block in chain.from_iterable(tensor.content for tensor in tensors):
                    file.write(block)
                    bar.update(len(block))
    originals = {shard: old[shard] for shard in sorted(shards)}
    if checkpoint.tied and HEAD in changes:
        originals["config.json"] = (checkpoint.folder / "config.json").resolve()
        _untie(folder)
    return originals
