"""The weights of a .mnn model, read one operator at a time: float, half float or quantized, whoever wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.graph import FLOAT16, Graph, prove_size
from hf2mnn.quant.blob import HEADER, SCALE_TYPES, Header, Levels, damaged, hollow, parse_header, parse_sparse
from hf2mnn.quant.names import module_of

LEVELS, SPARSE, BYTES = 1, 2, 4
"""`quanParameter.type` of weights stored as levels: packed, only what is not zero, or bare bytes."""


@dataclass(frozen=True)
class Operator:
    """A linear layer, or the patch embedding (`kernel` over 1: its inputs are channels times kernel).

    name: its module in the transformers model, where that is known. parts: (offset, bytes) of weight, scales and bias
    in the weight file (a weight of 0 bytes is elsewhere), and of a sparse float weight (whose numbers are the scales)
    the places of its numbers. stored: `quanParameter` of the graph, None where the weight is float32.
    """

    name: str
    outputs: int
    inputs: int
    kernel: int
    parts: tuple[tuple[int, int], ...]
    stored: dict[str, Any] | None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs

    def blocks(self, block: int) -> int:
        """Blocks in a row; `block` 0 is one."""
        return self.inputs // block if block else 1


MOST_WEIGHTS = (1 << 31) - 1
"""Of an operator: the engine counts them in 32 bits."""
FLOAT_MAX = float(np.finfo(np.float32).max)


def _operator(op: dict[str, Any], outputs: dict[str, str]) -> Operator:
    """Raises QuantizationError for a graph that anyone may have made, where its numbers cannot be."""
    try:
        made = _described(op, outputs)
        stored = made.stored
        numbers = (made.outputs, made.inputs, made.kernel)
        right = all(type(number) is int and number > 0 for number in numbers) and made.size <= MOST_WEIGHTS
        if stored:
            integers = [stored[key] for key in ("type", "readType", "aMin", "aMaxOrBits")]
            right &= all(type(number) is int and abs(number) <= MOST_WEIGHTS for number in integers)
            right &= type(stored["quantScale"]) in (int, float) and abs(stored["quantScale"]) < FLOAT_MAX
            right &= all(isinstance(stored[key], bool) for key in ("shapeInt32", "has_scaleInt"))
            right &= isinstance(stored["scaleStorage"], str)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise _unlike(op, f"{type(error).__name__}: {error}") from None
    if not right:
        raise _unlike(op, f"{made.outputs} x {made.inputs} weights")
    return made


def _unlike(op: dict[str, Any], what: str) -> QuantizationError:
    return QuantizationError(f"{op['name']}: the graph describes no layer ({what}); convert the model again")


def _described(op: dict[str, Any], outputs: dict[str, str]) -> Operator:
    main = op["main"]
    common, external, stored = main["common"], main.get("external"), main.get("quanParameter")
    name = module_of(op["name"], outputs)
    if not external:
        raise QuantizationError(f"{name}: its weight is inside the graph; convert with --saveExternalData")
    kernel = common["kernelX"] * common["kernelY"]
    inputs = common["inputCount"] * kernel // max(common.get("group", 1), 1)
    places = [size for size in external[4:] if size]
    sizes = [*external[1:4], *places] if stored else [external[1], 0, external[2]]
    starts = np.cumsum([external[0], *sizes]).tolist()
    parts = tuple(zip(starts, sizes, strict=False))
    return Operator(name, common["outputCount"], inputs, kernel, parts, stored)


def operators(graph: Graph, outputs: dict[str, str] | None = None) -> list[Operator]:
    """Every operator with a weight, in the order of the graph; `outputs` comes from `module_names`."""
    return [_operator(op, outputs or {}) for op in graph.of_type("Convolution")]


class WeightFile:
    """A .mnn.weight file under its graph. Reads what it is asked for, and keeps nothing."""

    def __init__(self, graph: Graph, path: Path) -> None:
        """Raises ConversionError where the file is shorter than the graph reads."""
        self.path = Path(path)
        size = self.path.stat().st_size if self.path.is_file() else 0
        prove_size(graph, self.path.name.removesuffix(".weight"), size)

    def raw(self, offset: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _numbers(self, part: tuple[int, int], dtype: type[np.generic]) -> np.ndarray:
        """As many as there are; like the engine, without bytes that are no whole one."""
        raw, size = self.raw(*part), np.dtype(dtype).itemsize
        return np.frombuffer(raw[: len(raw) // size * size], dtype)

    def bias(self, operator: Operator) -> bytes:
        """float32 [outputs]."""
        return self.raw(*operator.parts[2])

    def constants(self, op: dict[str, Any]) -> bytes:
        """float32 gamma and beta of a normalization, given as it stands in the graph."""
        return self.raw(op["main"]["external"][0], sum(op["main"]["external"][1:]))

    def rows(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """float32 [rows, inputs] from row `begin` up to `end`, exactly as the engine unpacks them.

        Raises:
            QuantizationError: the bytes are no weights of this operator, or are stored in a way that is not read.
        """
        end = operator.outputs if end is None else end
        kind = operator.stored["type"] if operator.stored else None
        if len(operator.parts) > 3:
            return self._sparse_floats(operator)[begin:end]
        if kind in (LEVELS, SPARSE, BYTES):
            return self.levels(operator, begin, end).dequantize()
        if kind not in (None, FLOAT16):
            raise QuantizationError(f"{operator.name}: weights of type {kind} are not read; convert the model again")
        dtype = np.dtype(np.float32 if kind is None else np.float16)
        (offset, size), row = operator.parts[0], operator.inputs * dtype.itemsize
        if size != operator.outputs * row:
            raise QuantizationError(f"{operator.name}: {size} bytes are not {operator.size} weights; convert it again")
        found = np.frombuffer(self.raw(offset + begin * row, (end - begin) * row), dtype)
        return found.astype(np.float32).reshape(end - begin, operator.inputs)

    def _sparse_floats(self, operator: Operator) -> np.ndarray:
        (_, values, _, places), count = operator.parts, operator.size
        numbers, indices = self._numbers(values, np.float32), self._numbers(places, np.uint32)
        if numbers.size != indices.size or indices.max(initial=0) >= count or hollow(count, numbers.size):
            raise QuantizationError(f"{operator.name}: {numbers.size} numbers do not fit into {count} weights")
        rows = np.zeros(count, np.float32)
        rows[indices] = numbers
        return rows.reshape(operator.outputs, operator.inputs)

    def header(self, operator: Operator) -> Header:
        """Of a weight whose levels are packed. Raises QuantizationError where there is none for it."""
        offset, size = operator.parts[0]
        raw = self.raw(offset, min(size, HEADER))
        return parse_header(raw, size, operator.size, operator.stored["shapeInt32"], operator.name)

    def _packed(self, operator: Operator, begin: int, end: int) -> np.ndarray:
        """int8 [rows, inputs]; what is read are the bytes of these rows."""
        head, (offset, _) = self.header(operator), operator.parts[0]
        # From a multiple of eight levels on, which begins with a byte.
        first, last = begin * operator.inputs, end * operator.inputs
        whole = first // 8 * 8
        raw = self.raw(offset + head.size + whole * head.bits // 8, ((last - whole) * head.bits + 7) // 8)
        return head.levels(raw, last - whole, operator.name)[first - whole :]

    def alpha(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """float32 [rows, blocks, 1 or 2]: the scale, or zero and scale, of each block of these rows as they are stored.

        Raises:
            QuantizationError: they do not fit the weight.
        """
        stored, (offset, size), rows = operator.stored, operator.parts[1], operator.outputs
        dtype = np.dtype(SCALE_TYPES[16 if stored["scaleStorage"] == "FP16" else 32])
        pairs, count = 2 if stored["readType"] or _is_old(stored) else 1, size // dtype.itemsize
        if not count or count % (pairs * rows) or operator.size % (count // pairs):
            raise QuantizationError(f"{operator.name}: {count} scales do not fit {rows} rows")
        end, row = rows if end is None else end, count // rows
        part = offset + begin * row * dtype.itemsize, (end - begin) * row * dtype.itemsize
        return self._numbers(part, dtype).astype(np.float32).reshape(end - begin, row // pairs, pairs)

    def levels(self, operator: Operator, begin: int = 0, end: int | None = None) -> Levels:
        """Rows of a quantized weight. Only of packed levels are they alone read."""
        stored, weight, name, count = operator.stored, operator.parts[0], operator.name, operator.size
        end = operator.outputs if end is None else end
        if stored["type"] == LEVELS:
            levels = self._packed(operator, begin, end)
        else:
            raw = self.raw(*weight)
            if stored["type"] == SPARSE:
                levels = parse_sparse(raw, self.alpha(operator).reshape(-1), count, stored["shapeInt32"], name)
            else:
                levels = np.frombuffer(raw, np.int8)
                if levels.size != count:
                    raise damaged(len(raw), count, name)
            levels = levels[begin * operator.inputs : end * operator.inputs]
        levels, alpha = levels.reshape(end - begin, operator.inputs), self.alpha(operator, begin, end)
        steps = alpha[:, :, -1]
        factor = np.float32(1 if stored["has_scaleInt"] or _is_old(stored) else stored["quantScale"])
        if alpha.shape[2] == 1:
            return Levels(levels, steps * factor, None)
        # Where aMin is negative the stored zero is the weight at level aMin; the engine moves it to level 0.
        lowest = np.float32(min(stored["aMin"] or -128, 0))
        return Levels(levels, steps * factor, (alpha[:, :, 0] - lowest * steps) * factor)


def _is_old(stored: dict[str, Any]) -> bool:
    return stored["type"] == BYTES and stored["aMin"] == 0 and abs(stored["quantScale"]) < 1e-6


class ModelWeights(WeightFile):
    """The weights of the `mnn` stage's graph: those of linear layers where the ONNX graph has them, the rest in its
    weight file.
    """

    def __init__(self, graph: Graph, path: Path, initializers: dict[str, StoredTensor]) -> None:
        """`initializers` are those of the ONNX graph that the MNN graph was made of."""
        super().__init__(graph, path)
        self.initializers = initializers

    def rows(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Raises QuantizationError where the ONNX graph has no such weight."""
        if operator.parts[0][1]:
            return super().rows(operator, begin, end)
        stored = self.initializers.get(f"{operator.name}.weight")
        if stored is None or stored.shape != (operator.outputs, operator.inputs):
            raise QuantizationError(
                f"{operator.name}: the ONNX graph has no weight of {operator.outputs} x {operator.inputs} for it; make"
                " the onnx and mnn stages again"
            )
        return stored.rows(begin, operator.outputs if end is None else end)
