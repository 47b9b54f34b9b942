"""The weights of a .mnn model, read one operator at a time: float, half float or quantized, whoever wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.errors import QuantizationError
from hf2mnn.mnn.graph import FLOAT16, Graph, prove_size
from hf2mnn.quant.blob import SCALE_TYPES, Levels, parse_levels
from hf2mnn.quant.names import module_of

LEVELS = 1
"""`quanParameter.type` of weights stored as levels."""


@dataclass(frozen=True)
class Operator:
    """A linear layer, or the patch embedding (`kernel` over 1: its inputs are channels times kernel).

    name: its module in the transformers model, where that is known. parts: (offset, bytes) of weight, scales and bias
    in the weight file. stored: `quanParameter` of the graph, None where the weight is float32.
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


def _operator(op: dict[str, Any], outputs: dict[str, str]) -> Operator:
    main = op["main"]
    common, external, stored = main["common"], main.get("external"), main.get("quanParameter")
    name = module_of(op["name"], outputs)
    if not external:
        raise QuantizationError(f"{name}: its weight is inside the graph; convert with --saveExternalData")
    kernel = common["kernelX"] * common["kernelY"]
    inputs = common["inputCount"] * kernel // max(common.get("group", 1), 1)
    sizes = [external[1], external[2], external[3]] if stored else [external[1], 0, external[2]]
    starts = np.cumsum([external[0], *sizes]).tolist()
    parts = tuple(zip(starts[:3], sizes, strict=True))
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
        if kind == LEVELS:
            return self.levels(operator).dequantize()[begin:end]
        if kind not in (None, FLOAT16):
            raise QuantizationError(f"{operator.name}: weights of type {kind} are not read; convert the model again")
        dtype = np.dtype(np.float32 if kind is None else np.float16)
        (offset, size), row = operator.parts[0], operator.inputs * dtype.itemsize
        if size != operator.outputs * row:
            raise QuantizationError(f"{operator.name}: {size} bytes are not {operator.size} weights; convert it again")
        found = np.frombuffer(self.raw(offset + begin * row, (end - begin) * row), dtype)
        return found.astype(np.float32).reshape(end - begin, operator.inputs)

    def levels(self, operator: Operator) -> Levels:
        """The whole of a quantized weight."""
        stored, (weight, scales, _) = operator.stored, operator.parts
        levels, _ = parse_levels(self.raw(*weight), operator.size, stored["shapeInt32"], operator.name)
        dtype = SCALE_TYPES[16 if stored["scaleStorage"] == "FP16" else 32]
        alpha = np.frombuffer(self.raw(*scales), dtype).astype(np.float32)
        pairs = 1 if stored["readType"] == 0 else 2
        if not alpha.size or alpha.size % (pairs * operator.outputs) or operator.size % (alpha.size // pairs):
            raise QuantizationError(f"{operator.name}: {alpha.size} scales do not fit {operator.outputs} rows")
        alpha = alpha.reshape(operator.outputs, -1, pairs)
        if not stored["has_scaleInt"] and stored["quantScale"] != 1.0:
            alpha = alpha * np.float32(stored["quantScale"])
        levels = levels.reshape(operator.outputs, operator.inputs)
        if pairs == 1:
            return Levels(levels, alpha[:, :, 0], None)
        # Where aMin is negative the stored zero is the weight at level aMin; the engine moves it to level 0.
        lowest = np.float32(min(stored["aMin"] or -128, 0))
        return Levels(levels, alpha[:, :, 1], alpha[:, :, 0] - lowest * alpha[:, :, 1])
