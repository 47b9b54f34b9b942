"""Write the weight file of a model with its weights in other formats, one operator after the other.

Memory holds the rows that are being quantized and the result of one or two operators, for any size of the model.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf2mnn.core.errors import QuantizationError
from hf2mnn.core.progress import progress
from hf2mnn.mnn.graph import FLOAT16, Graph, Op
from hf2mnn.quant.blob import SCALE_TYPES, Quantized, header, pack, scale_bytes, squared_error, squares
from hf2mnn.quant.formats import WeightFormat
from hf2mnn.quant.rounding import Method
from hf2mnn.quant.weights import Operator, WeightFile

WEIGHTS_AT_ONCE = 1 << 19
"""Weights of a chunk, which one thread processes: 2 MB of float32, which fit into caches."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 32 << 20
"""Parameters of mallopt, from glibc's malloc.h, and the largest value that it accepts for M_MMAP_THRESHOLD."""

Chunk = tuple[bytes, bytes, float, float]
"""Encoded rows of an operator: weights, scales, sum of squared errors, sum of squared weights."""


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory; the kernel would clear it again for the next chunk, which takes half of all time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) if mallopt else ():
        mallopt(threshold, KEPT_BYTES)


def _encode_floats(rows: np.ndarray, operator: Operator, bits: int) -> tuple[bytes, bytes, float]:
    if bits == 32:
        return rows.tobytes(), b"", 0.0
    if np.abs(rows).max(initial=0) > np.finfo(np.float16).max:
        raise QuantizationError(f"{operator.name}: its weights exceed the range of float16; use 8 or 32 bits")
    stored = rows.astype(np.float16)
    return stored.tobytes(), b"", squares(rows - stored.astype(np.float32))


def _encode_quantized(
    rows: np.ndarray, quantized: Quantized, operator: Operator, form: WeightFormat
) -> tuple[bytes, bytes, float]:
    if np.abs(quantized.alpha).max(initial=0) > np.finfo(SCALE_TYPES[form.scale_bits]).max:
        raise QuantizationError(f"{operator.name}: its scales exceed the range of float16; use scale_bits: 32")
    weights, scales = pack(quantized.q, form.bits), scale_bytes(quantized, form.scale_bits)
    return weights, scales, squared_error(rows, quantized)


def _encode(
    operator: Operator, source: WeightFile, form: WeightFormat, methods: Method, pool: ThreadPoolExecutor
) -> Iterable[Chunk]:
    """Encode an operator in the threads of `pool`."""
    round_rows = methods.prepare(operator, form) if form.bits < 16 else None
    # A multiple of eight rows, so that a chunk has whole bytes.
    step = max(WEIGHTS_AT_ONCE // operator.inputs // 8, 1) * 8

    def encode(begin: int) -> Chunk:
        rows = source.rows(operator, begin, min(begin + step, operator.outputs))
        norm = squares(rows)
        if not np.isfinite(norm):
            raise QuantizationError(
                f"{operator.name}: its weight has NaN or infinite numbers; the checkpoint is damaged, fetch it again"
            )
        if round_rows is None:
            return *_encode_floats(rows, operator, form.bits), norm
        return *_encode_quantized(rows, round_rows(begin, rows), operator, form), norm

    return pool.map(encode, range(0, operator.outputs, step))


def _append(
    out: BinaryIO, main: dict[str, Any], operator: Operator, bias: bytes, form: WeightFormat, chunks: Iterable[Chunk]
) -> dict[str, Any]:
    """Write the chunks of an operator, update its part of the graph, and return its row of the table."""
    start, wide = out.tell(), False
    if form.bits < 16:
        head, wide = header(operator.outputs, operator.inputs, form.blocks(operator.inputs), form.bits)
        out.write(head)
    scales, error, norm = bytearray(), 0.0, 0.0
    for weights, chunk_scales, chunk_error, chunk_norm in chunks:
        out.write(weights)
        scales += chunk_scales
        error, norm = error + chunk_error, norm + chunk_norm
    sizes = [out.tell() - start, len(scales)]
    out.write(scales + bias)
    main.pop("quanParameter", None)
    if form.bits == 32:
        main["external"] = [start, sizes[0], len(bias)]
    else:
        parameters = form.parameters(operator.outputs, operator.inputs, wide)
        main |= {"quanParameter": parameters, "external": [start, *sizes, len(bias), 0]}
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
) -> tuple[Graph, list[dict[str, Any]]]:
    """Write the weights of a float graph, `layers` from `source`, to the .mnn.weight file `destination`.

    Return the graph of the new weight file, and a row for each operator: the `label` of its part, its shape, format and
    bytes, and the relative error of its weight (norm of the error over norm of the weight). Raise QuantizationError if
    a weight has NaN, exceeds the range of its format, or is quantized already.
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

        def start(op: Op) -> tuple[Op, Operator | None, Iterable[Chunk]]:
            operator = by_op.get(op["name"])
            return op, operator, _encode(operator, source, formats[operator.name], methods, pool) if operator else ()

        # By `pairwise`, threads quantize the next operator while this one is written.
        for (op, operator, chunks), _ in pairwise(chain(map(start, external), [None])):
            main = op["main"]
            if operator:
                row = _append(out, main, operator, source.bias(operator), formats[operator.name], chunks)
                rows.append({"part": label, **row})
                bar.update(operator.size)
            else:
                constants = source.constants(op)
                main["external"][0] = out.tell()
                out.write(constants)
    return written, rows
