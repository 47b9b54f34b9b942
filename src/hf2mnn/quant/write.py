"""Write the weight file of a model with its weights in other formats, one operator after the other.

Memory holds the rows that are being quantized and the result of one or two operators, for any size of the model.
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
from hf2mnn.mnn.graph import FLOAT16, Graph, Op
from hf2mnn.quant.blob import SCALE_TYPES, Quantized, header, pack, scale_bytes, squared_error, squares
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.methods import Method
from hf2mnn.quant.weights import DENSE, Operator, WeightFile

WEIGHTS_AT_ONCE = 1 << 19
"""Weights of a chunk, which one thread processes: 2 MB of float32, which fit into caches."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from glibc's malloc.h."""
KEPT_BYTES = 32 << 20
"""Largest value that glibc accepts for M_MMAP_THRESHOLD."""

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class _Chunk:
    """Encoded rows of an operator, with their sums of squared errors and squared weights."""

    weights: bytes
    scales: bytes
    error: float
    norm: float


def _spans(operator: Operator) -> list[tuple[int, int]]:
    """Return the first row and the end of each chunk; multiples of eight rows, so that a chunk has whole bytes."""
    step = max(WEIGHTS_AT_ONCE // operator.inputs // 8, 1) * 8
    return [(begin, min(begin + step, operator.outputs)) for begin in range(0, operator.outputs, step)]


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory; the kernel would clear it again for the next chunk, which takes half of all time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) if mallopt else ():
        mallopt(threshold, KEPT_BYTES)


def _encode_floats(rows: np.ndarray, operator: Operator, bits: int, norm: float) -> _Chunk:
    if bits == 16 and np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise QuantizationError(f"{operator.name}: its weights exceed the range of float16; use 8 or 32 bits")
    stored = rows.astype(np.float16 if bits == 16 else np.float32)
    error = squares(rows - stored.astype(np.float32)) if bits == 16 else 0.0
    return _Chunk(stored.tobytes(), b"", error, norm)


def _encode_quantized(
    rows: np.ndarray, quantized: Quantized, operator: Operator, form: WeightFormat, norm: float
) -> _Chunk:
    parts = [quantized.scales] if quantized.zero_points is None else [quantized.scales, quantized.zero_points]
    if max(np.abs(part).max(initial=0) for part in parts) > np.finfo(SCALE_TYPES[form.scale_bits]).max:
        raise QuantizationError(f"{operator.name}: its scales exceed the range of float16; use scale_bits: 32")
    packed, scales = pack(quantized.q, form.bits), scale_bytes(quantized, form.scale_bits)
    return _Chunk(packed, scales, squared_error(rows, quantized), norm)


def _encode(
    operator: Operator, source: WeightFile, form: WeightFormat, methods: Method, pool: ThreadPoolExecutor
) -> Iterable[_Chunk]:
    """Encode an operator in the threads of `pool`."""
    round_rows = methods.prepare(operator, form) if form.bits < 16 else None

    def encode(span: tuple[int, int]) -> _Chunk:
        rows = source.rows(operator, *span)
        norm = squares(rows)
        if not np.isfinite(norm):
            raise QuantizationError(
                f"{operator.name}: its weight has NaN or infinite numbers; the checkpoint is damaged, fetch it again"
            )
        if round_rows is None:
            return _encode_floats(rows, operator, form.bits, norm)
        return _encode_quantized(rows, round_rows(span[0], rows), operator, form, norm)

    return pool.map(encode, _spans(operator))


def _one_ahead(items: Iterable[Item], start: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of `start`, which is called one item ahead."""
    pending: tuple[Item, Result] | None = None
    for item in items:
        started = (item, start(item))
        if pending:
            yield pending
        pending = started
    if pending:
        yield pending


def _description(operator: Operator, form: WeightFormat, wide: bool) -> dict[str, Any]:
    """Return `quanParameter` of the graph."""
    described = {"type": FLOAT16, "useInt32": False, "quantScale": 0.0, "scaleIn": 0.0, "scaleOut": 0.0}
    described |= {"aMaxOrBits": 0, "aMin": 0, "readType": 0, "has_scaleInt": False, "shapeInt32": wide}
    described |= {"weightSize": 0, "scaleStorage": "FP32"}
    if form.bits == 16:
        return described
    described |= {"type": DENSE, "quantScale": 1.0, "aMaxOrBits": form.bits}
    described["scaleStorage"] = "FP16" if form.scale_bits == 16 else "FP32"
    if not form.symmetric:
        # aMin 1: the stored zero point is the weight at q = 0. It is smaller than the weight at the lowest q, so its
        # float16 is closer, and the engine reads embeddings from no other form.
        described |= {"aMin": 1, "readType": operator.outputs * operator.blocks(form.block)}
    return described


def _append(
    operator: Operator,
    main: dict[str, Any],
    source: WeightFile,
    out: BinaryIO,
    form: WeightFormat,
    chunks: Iterable[_Chunk],
) -> dict[str, Any]:
    """Write the chunks of an operator, update its part of the graph, and return its row of the table."""
    start, wide = out.tell(), False
    if form.bits < 16:
        head, wide = header(operator.outputs, operator.inputs, operator.blocks(form.block), form.bits)
        out.write(head)
    scales, error, norm = [], 0.0, 0.0
    for chunk in chunks:
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
    methods: Method,
    threads: int,
    label: str,
) -> tuple[Graph, pd.DataFrame]:
    """Write the weights of a float graph, `layers` from `source`, to the .mnn.weight file `destination`.

    Returns:
        The graph of the new weight file, and a row for each operator: its shape, its format, its bytes, and the
        relative error of its weight (norm of the error over norm of the weight).

    Raises:
        QuantizationError: A weight has NaN, exceeds the range of its format, or is quantized already.
    """
    for operator in layers:
        if operator.stored and operator.stored["type"] != FLOAT16:
            raise QuantizationError(f"{operator.name}: its weight is quantized already; start from the float model")
    written, rows = Graph(copy.deepcopy(graph.content)), []
    by_op = {op["name"]: operator for op, operator in zip(graph.of_type("Convolution"), layers, strict=True)}
    external = [op for op in written.ops if isinstance(op.get("main"), dict) and op["main"].get("external")]
    external.sort(key=lambda op: op["main"]["external"][0])
    total = sum(operator.size for operator in layers)
    _keep_freed_memory()
    with destination.open("wb") as out, ThreadPoolExecutor(threads) as pool, progress(label, total, "weights") as bar:

        def start(op: Op) -> Iterable[_Chunk] | None:
            operator = by_op.get(op["name"])
            return operator and _encode(operator, source, formats[operator.name], methods, pool)

        # Threads quantize the next operator while this one is written.
        for op, chunks in _one_ahead(external, start):
            main = op["main"]
            if chunks is not None:
                operator = by_op[op["name"]]
                rows.append(_append(operator, main, source, out, formats[operator.name], chunks))
                bar.update(operator.size)
            else:
                offset = out.tell()
                out.write(source.constants(op))
                main["external"][0] = offset
    return written, pd.DataFrame(rows)
