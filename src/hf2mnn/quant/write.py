"""Write a float MNN model with its weights in other formats, one operator after another.

What is in memory at a time are the rows that are being rounded and one operator's result, whatever the model's size.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pandas as pd

from hf2mnn.core.errors import QuantizationError
from hf2mnn.core.progress import progress
from hf2mnn.mnn.convert import WeightFormat
from hf2mnn.mnn.graph import FLOAT16, Graph
from hf2mnn.quant.blob import SCALE_TYPES, Levels, header, pack, scale_bytes, squared_error, squares
from hf2mnn.quant.weights import LEVELS, Operator, WeightFile

WEIGHTS_AT_ONCE = 1 << 19
"""Weights that a thread works on at a time: 2 MB of float32, which caches hold."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
KEPT = 32 << 20
"""Bytes; the most that glibc takes for M_MMAP_THRESHOLD."""

Item, Begun = TypeVar("Item"), TypeVar("Begun")
RoundRows = Callable[[int, np.ndarray], Levels]
"""(first row, float32 [rows, inputs]) to levels; each row is rounded by itself, by any thread."""
Method = Callable[[Operator, WeightFormat], RoundRows]
"""What is needed for an operator, made ready before its rows are read."""


@dataclass(frozen=True)
class _Stored:
    """A chunk's bytes, its scales' bytes, and sums over it: squared error and squared weights."""

    weights: bytes
    scales: bytes
    error: float
    norm: float


def _chunks(operator: Operator) -> list[tuple[int, int]]:
    """Rows from begin to end; eight or a multiple, so that each chunk's bits fill whole bytes."""
    step = max(WEIGHTS_AT_ONCE // operator.inputs // 8, 1) * 8
    return [(begin, min(begin + step, operator.outputs)) for begin in range(0, operator.outputs, step)]


def _keep_freed_memory() -> None:
    """Glibc gives back what was freed, and the kernel clears it again for the next chunk: half of all time. Other
    systems have no such function, and other ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) if mallopt else ():
        mallopt(threshold, KEPT)


def _float_rows(rows: np.ndarray, operator: Operator, bits: int, norm: float) -> _Stored:
    if bits == 16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise QuantizationError(f"{operator.name}: its weights are too large for half floats; use 8 or 32 bits")
    stored = rows.astype(np.float16 if bits == 16 else np.float32)
    error = squares(rows - stored.astype(np.float32)) if bits == 16 else 0.0
    return _Stored(stored.tobytes(), b"", error, norm)


def _level_rows(rows: np.ndarray, levels: Levels, operator: Operator, form: WeightFormat, norm: float) -> _Stored:
    parts = [levels.scales] if levels.zeros is None else [levels.scales, levels.zeros]
    if max(np.abs(part).max(initial=0) for part in parts) > np.finfo(SCALE_TYPES[form.scale_bits]).max:
        raise QuantizationError(f"{operator.name}: its scales are too large for half floats; use scale_bits: 32")
    packed, scales = pack(levels.levels, form.bits), scale_bytes(levels, form.scale_bits)
    return _Stored(packed, scales, squared_error(rows, levels), norm)


def _store(
    operator: Operator, source: WeightFile, form: WeightFormat, method: Method, pool: ThreadPoolExecutor
) -> Iterable[_Stored]:
    round_rows = method(operator, form) if form.bits < 16 else None

    def convert(span: tuple[int, int]) -> _Stored:
        rows = source.rows(operator, *span)
        norm = squares(rows)
        if not np.isfinite(norm):
            raise QuantizationError(
                f"{operator.name}: its weight holds NaN or infinite numbers; the checkpoint is damaged, fetch it again"
            )
        if round_rows is None:
            return _float_rows(rows, operator, form.bits, norm)
        return _level_rows(rows, round_rows(span[0], rows), operator, form, norm)

    return pool.map(convert, _chunks(operator))


def _one_ahead(items: Iterable[Item], begin: Callable[[Item], Begun]) -> Iterator[tuple[Item, Begun]]:
    """Each item with what `begin` gives for it, which is called an item early."""
    pending: tuple[Item, Begun] | None = None
    for item in items:
        begun = (item, begin(item))
        if pending:
            yield pending
        pending = begun
    if pending:
        yield pending


def _description(operator: Operator, form: WeightFormat, wide: bool) -> dict[str, Any]:
    """`quanParameter` of the graph."""
    described = {"type": FLOAT16, "useInt32": False, "quantScale": 0.0, "scaleIn": 0.0, "scaleOut": 0.0}
    described |= {"aMaxOrBits": 0, "aMin": 0, "readType": 0, "has_scaleInt": False, "shapeInt32": wide}
    described |= {"weightSize": 0, "scaleStorage": "FP32"}
    if form.bits == 16:
        return described
    described |= {"type": LEVELS, "quantScale": 1.0, "aMaxOrBits": form.bits}
    described["scaleStorage"] = "FP16" if form.scale_bits == 16 else "FP32"
    if not form.symmetric:
        # aMin 1: the stored zero is the weight at level 0. It is a smaller number than the weight at the lowest level,
        # so its half float is closer, and the engine reads embeddings from no other form.
        described |= {"aMin": 1, "readType": operator.outputs * operator.blocks(form.block)}
    return described


def _append(
    operator: Operator,
    main: dict[str, Any],
    source: WeightFile,
    out: BinaryIO,
    form: WeightFormat,
    stored: Iterable[_Stored],
) -> dict[str, Any]:
    """Write an operator's chunks and point its part of the graph at them; a row of the table."""
    start, wide = out.tell(), False
    if form.bits < 16:
        head, wide = header(operator.outputs, operator.inputs, operator.blocks(form.block), form.bits)
        out.write(head)
    scales, error, norm = [], 0.0, 0.0
    for chunk in stored:
        out.write(chunk.weights)
        scales.append(chunk.scales)
        error, norm = error + chunk.error, norm + chunk.norm
    sizes = [out.tell() - start, sum(map(len, scales))]
    bias = source.bias(operator)
    for part in (*scales, bias):
        out.write(part)
    main.pop("quanParameter", None)
    if form.bits == 32:
        main["external"] = [start, sizes[0], len(bias)]
    else:
        main |= {"quanParameter": _description(operator, form, wide), "external": [start, *sizes, len(bias), 0]}
    row = {"operator": operator.name, "outputs": operator.outputs, "inputs": operator.inputs, **asdict(form)}
    return row | {"bytes": sum(sizes), "weight_error": (error / norm) ** 0.5 if norm else 0.0}


def write_weights(
    graph: Graph,
    layers: list[Operator],
    source: WeightFile,
    destination: Path,
    formats: dict[str, WeightFormat],
    method: Method,
    threads: int,
    label: str,
) -> tuple[Graph, pd.DataFrame]:
    """Write `destination`, a .mnn.weight file; gives the graph that reads it, and a row for each operator: its shape,
    its format, its bytes, and the relative error of its weight (the norm of the error over that of the weight).

    `layers` are the graph's operators, `formats` has one for each by name.

    Raises:
        QuantizationError: with the operator's name: NaN in a weight, scales too large for half floats, a weight that is
            quantized already.
    """
    for operator in layers:
        if operator.stored and operator.stored["type"] != FLOAT16:
            raise QuantizationError(f"{operator.name}: its weight is quantized already; start from the float model")
    written, rows = Graph(copy.deepcopy(graph.content)), []
    by_op = {op["name"]: operator for op, operator in zip(graph.of_type("Convolution"), layers, strict=True)}
    inside = [op for op in written.ops if isinstance(op.get("main"), dict) and op["main"].get("external")]
    inside.sort(key=lambda op: op["main"]["external"][0])
    total = sum(operator.size for operator in layers)
    _keep_freed_memory()
    with destination.open("wb") as out, ThreadPoolExecutor(threads) as pool, progress(label, total, "weights") as shown:

        def begin(op: dict[str, Any]) -> Iterable[_Stored] | None:
            operator = by_op.get(op["name"])
            return operator and _store(operator, source, formats[operator.name], method, pool)

        # Threads round the next operator while this one is written.
        for op, stored in _one_ahead(inside, begin):
            main = op["main"]
            if stored is not None:
                operator = by_op[op["name"]]
                rows.append(_append(operator, main, source, out, formats[operator.name], stored))
                shown.update(operator.size)
            else:
                start = out.tell()
                out.write(source.constants(op))
                main["external"][0] = start
    return written, pd.DataFrame(rows)
