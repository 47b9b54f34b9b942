"""Weights of a .mnn model, read one operator at a time: float, half float or quantized, of any converter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.errors import QuantizationError
from hf2mnn.mnn.adapt import FLAT
from hf2mnn.mnn.graph import FLOAT16, LINEAR, Graph, Op, check_size
from hf2mnn.onnx.initializers import load_graph
from hf2mnn.onnx.tap_points import outputs_by_module
from hf2mnn.quant import blob
from hf2mnn.quant.formats import DENSE, INT8, SPARSE

FRAME = re.compile(r"__\d+$")
"""Suffix of the convolutions into which the converter splits a three-dimensional one (the patch embedding)."""
MAX_WEIGHTS = (1 << 31) - 1
"""Largest number of weights of an operator; the engine counts them in 32 bits."""
FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Operator:
    """A linear layer, or the patch embedding of a vision tower."""

    name: str  # its module in the transformers model if known, else its name in the graph
    outputs: int  # output channels
    inputs: int  # input channels times kernel size
    kernel: int  # kernel size; 1 for a linear layer
    parts: tuple[tuple[int, int], ...]
    """Offset and bytes of weight, scales and bias in the weight file; of a sparse float weight the scales are its
    numbers, and a fourth part their indices. A weight of 0 bytes is not in this file."""
    stored: dict[str, Any] | None  # `quanParameter` of the graph; None for a float32 weight

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs

    @property
    def scale_type(self) -> np.dtype:
        """Type of the stored scales of a quantized weight."""
        return np.dtype(blob.SCALE_TYPES[16 if self.stored["scaleStorage"] == "FP16" else 32])

    @property
    def is_legacy(self) -> bool:
        """Whether a quantized weight is int8 of an old converter, with other meanings of its parameters."""
        return self.stored["type"] == INT8 and self.stored["aMin"] == 0 and abs(self.stored["quantScale"]) < 1e-6


def module_names(graph: Path) -> dict[str, str]:
    """Return the module of each output of an ONNX graph that an operator computes: "logits" is of "lm_head"."""
    modules = {output: module for module, output in outputs_by_module(load_graph(graph)).items()}
    return modules | {f"{output}{FLAT}": module for output, module in modules.items()}


def _operator(op: Op, modules: dict[str, str]) -> Operator:
    """Parse an operator of an untrusted graph: keys may be missing, and numbers impossible."""
    value = FRAME.sub("", op["name"].removesuffix(LINEAR))
    name = modules.get(value, value)
    try:
        main = op["main"]
        common, external, stored = main["common"], main.get("external"), main.get("quanParameter")
        if not external:
            raise QuantizationError(f"{name}: its weight is inside the graph; convert with --saveExternalData")
        outputs, kernel = common["outputCount"], common["kernelX"] * common["kernelY"]
        inputs = common["inputCount"] * kernel // max(common.get("group", 1), 1)
        indices = [size for size in external[4:] if size]
        sizes = [*external[1:4], *indices] if stored else [external[1], 0, external[2]]
        starts = np.cumsum([external[0], *sizes]).tolist()
        valid = all(type(number) is int and number > 0 for number in (outputs, inputs, kernel))
        valid = valid and outputs * inputs <= MAX_WEIGHTS
        if stored:
            integers = [stored[key] for key in ("type", "readType", "aMin", "aMaxOrBits")]
            valid &= all(type(number) is int and abs(number) <= MAX_WEIGHTS for number in integers)
            valid &= type(stored["quantScale"]) in (int, float) and abs(stored["quantScale"]) < FLOAT_MAX
            valid &= all(isinstance(stored[key], bool) for key in ("shapeInt32", "has_scaleInt"))
            valid &= isinstance(stored["scaleStorage"], str)
        reason = None if valid else f"{outputs} x {inputs} weights"
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise QuantizationError(
            f"{op['name']}: its description in the graph is not that of a layer ({reason}); convert the model again"
        )
    return Operator(name, outputs, inputs, kernel, tuple(zip(starts, sizes, strict=False)), stored)


def operators(graph: Graph, modules: dict[str, str] | None = None) -> list[Operator]:
    """Return every operator with a weight, in the order of the graph; `modules` are from `module_names`.

    Raise QuantizationError if a weight is inside the graph, or if the description of an operator is invalid.
    """
    return [_operator(op, modules or {}) for op in graph.of_type("Convolution")]


class WeightFile:
    """A weight file and its graph; every call reads the file anew."""

    def __init__(self, graph: Graph, path: Path) -> None:
        """Raise ConversionError if the file is shorter than the graph reads."""
        self.path = Path(path)
        check_size(graph, self.path.name, self.path.stat().st_size if self.path.is_file() else 0)

    def raw(self, offset: int, size: int) -> bytes:
        """Return bytes of the file."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _numbers(self, part: tuple[int, int], dtype: type[np.generic]) -> np.ndarray:
        """Return all whole numbers of a part; like the engine, ignore the bytes after them."""
        raw, size = self.raw(*part), np.dtype(dtype).itemsize
        return np.frombuffer(raw[: len(raw) // size * size], dtype)

    def bias(self, operator: Operator) -> bytes:
        """Return the bias, float32 [outputs]."""
        return self.raw(*operator.parts[2])

    def constants(self, op: Op) -> bytes:
        """Return float32 gamma and beta of a normalization."""
        return self.raw(op["main"]["external"][0], sum(op["main"]["external"][1:]))

    def rows(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return rows `begin` to `end` as float32 [rows, inputs], with the bits that the engine computes.

        Raise QuantizationError if the bytes are not the weights of this operator, or if their type is not supported.
        """
        end = operator.outputs if end is None else end
        name, kind = operator.name, operator.stored["type"] if operator.stored else None
        if len(operator.parts) > 3:
            return self._sparse_floats(operator)[begin:end]
        if kind in (DENSE, SPARSE, INT8):
            return self.quantized(operator, begin, end).dequantize()
        if kind not in (None, FLOAT16):
            raise QuantizationError(f"{name}: weights of type {kind} are not supported; convert the model again")
        dtype = np.dtype(np.float32 if kind is None else np.float16)
        (offset, size), row = operator.parts[0], operator.inputs * dtype.itemsize
        if size != operator.outputs * row:
            raise QuantizationError(f"{name}: {size} bytes are not {operator.size} weights; convert it again")
        values = np.frombuffer(self.raw(offset + begin * row, (end - begin) * row), dtype)
        return values.astype(np.float32).reshape(end - begin, operator.inputs)

    def _sparse_floats(self, operator: Operator) -> np.ndarray:
        (_, values, _, positions), count = operator.parts, operator.size
        numbers, indices = self._numbers(values, np.float32), self._numbers(positions, np.uint32)
        inside = numbers.size == indices.size and indices.max(initial=0) < count
        if not inside or blob.is_decompression_bomb(count, numbers.size):
            raise QuantizationError(
                f"{operator.name}: {numbers.size} numbers do not fit into {count} weights; convert the model again"
            )
        weights = np.zeros(count, np.float32)
        weights[indices] = numbers
        return weights.reshape(operator.outputs, operator.inputs)

    def header(self, operator: Operator) -> blob.Header:
        """Return the header of a dense quantized weight. Raise QuantizationError if it has none."""
        offset, size = operator.parts[0]
        raw = self.raw(offset, min(size, blob.MAX_HEADER))
        return blob.parse_header(raw, size, operator.size, operator.stored["shapeInt32"], operator.name)

    def _dense(self, operator: Operator, begin: int, end: int) -> np.ndarray:
        """Return q of these rows, int8 [rows * inputs]; only their bytes are read."""
        head, (offset, _) = self.header(operator), operator.parts[0]
        # Start at a multiple of eight values, which is the beginning of a byte.
        first, last = begin * operator.inputs, end * operator.inputs
        aligned = first // 8 * 8
        raw = self.raw(offset + head.size + aligned * head.bits // 8, ((last - aligned) * head.bits + 7) // 8)
        return head.decode(raw, last - aligned, operator.name)[first - aligned :]

    def alpha(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return the stored scales of rows as float32 [rows, blocks, 1], or [rows, blocks, 2] with zero points first.

        Raise QuantizationError if their number does not fit the weight.
        """
        (offset, size), rows, dtype = operator.parts[1], operator.outputs, operator.scale_type
        pairs, count = 2 if operator.stored["readType"] or operator.is_legacy else 1, size // dtype.itemsize
        if not count or count % (pairs * rows) or operator.size % (count // pairs):
            raise QuantizationError(f"{operator.name}: {count} scales do not fit {rows} rows; convert the model again")
        end, row = rows if end is None else end, count // rows
        part = offset + begin * row * dtype.itemsize, (end - begin) * row * dtype.itemsize
        return self._numbers(part, dtype).astype(np.float32).reshape(end - begin, row // pairs, pairs)

    def quantized(self, operator: Operator, begin: int = 0, end: int | None = None) -> blob.Quantized:
        """Return rows of a quantized weight; of a dense weight, only these rows are read."""
        stored, count, inputs = operator.stored, operator.size, operator.inputs
        end = operator.outputs if end is None else end
        if stored["type"] == DENSE:
            q = self._dense(operator, begin, end)
        else:
            raw = self.raw(*operator.parts[0])
            if stored["type"] == SPARSE:
                q = blob.parse_sparse(raw, self.alpha(operator).reshape(-1), count, stored["shapeInt32"], operator.name)
            elif len(raw) == count:
                q = np.frombuffer(raw, np.int8)
            else:
                raise blob.damaged(len(raw), count, operator.name)
            q = q[begin * inputs : end * inputs]
        q, alpha = q.reshape(end - begin, inputs), self.alpha(operator, begin, end)
        scales = alpha[:, :, -1]
        factor = np.float32(1 if stored["has_scaleInt"] or operator.is_legacy else stored["quantScale"])
        if alpha.shape[2] == 1:
            return blob.Quantized(q, scales * factor, None)
        # With a negative aMin, the stored number is the weight at q = aMin; the engine converts it to that at q = 0.
        lowest = np.float32(min(stored["aMin"] or -128, 0))
        return blob.Quantized(q, scales * factor, (alpha[:, :, 0] - lowest * scales) * factor)


class ModelWeights(WeightFile):
    """Weights of a graph of the convert stage: linear layers from the ONNX graph, the rest from its weight file."""

    def __init__(self, graph: Graph, path: Path, initializers: dict[str, StoredTensor]) -> None:
        """Open the weight file of a graph; `initializers` are those of the ONNX graph by name."""
        super().__init__(graph, path)
        self.initializers = initializers

    def rows(self, operator: Operator, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return rows as `WeightFile.rows` does. Raise QuantizationError if the ONNX graph has no such weight."""
        if operator.parts[0][1]:
            return super().rows(operator, begin, end)
        stored = self.initializers.get(f"{operator.name}.weight")
        if stored is None or stored.shape != (operator.outputs, operator.inputs):
            raise QuantizationError(
                f"{operator.name}: the ONNX graph has no weight of {operator.outputs} x {operator.inputs} for it; run"
                " 'hf2mnn export' and 'hf2mnn convert' again"
            )
        return stored.rows(begin, operator.outputs if end is None else end)
