"""MNN graphs as JSON: queries, edits, builders of operators, and checks of a conversion.

The JSON form is that of MNN's flatbuffer schema (`schema/default/MNN.fbs`), which the converter reads and writes.
Weights are outside of it, in a weight file: operators have `external` [offset, sizes in bytes ...].
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.engine_facts import UNSUPPORTED_OPERATORS

Op = dict[str, Any]  # an operator in its JSON form

LINEAR = "__matmul_converted"
"""Suffix of the convolution that the converter makes of a linear layer, after the name of the layer's output."""
NC4HW4 = "NC4HW4"  # layout of the inputs and outputs of convolutions: groups of four channels
ROTARY_NORMS = ("q_norm", "k_norm")
"""Normalizations that a RoPE operator computes itself; their gamma is in the graph, not in the weight file."""
FLOAT16 = 3  # `quanParameter.type` of weights stored as float16
DUMP_ERROR = 1e-6  # largest rounding error of floats in the converter's JSON, which has six decimals
MAIN_TYPES = {
    "Const": "Blob",
    "ConvertTensor": "TensorConvertInfo",
    "Convolution": "Convolution2D",
    "RoPE": "RoPEParam",
}
"""Types of an operator's `main` that are not named like the operator."""


@dataclass(frozen=True)
class WeightInfo:
    """Storage of the weight of one convolution."""

    name: str  # of the operator
    inputs: int  # input channels times kernel size
    outputs: int  # output channels
    kernel: int  # kernel size; 1 but for the patch embedding of a vision tower
    bits: int  # 32 and 16 for floats, 1 to 8 for integers
    block: int  # inputs that share a scale; 0 for one scale per output channel
    symmetric: bool  # whether there are no zero points
    scale_bits: int  # size of a scale, 16 or 32
    size: int  # bytes in the weight file


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _check_op(op: Any, tensors: int) -> None:
    if isinstance(op, dict) and type(op.get("type")) is int:
        # The converter dumps a type that its schema has no name for as a number.
        op["type"] = str(op["type"])
    if not isinstance(op, dict) or not all(isinstance(op.get(key), str) for key in ("name", "type")):
        raise ValueError("an operator has no name or no type")
    for indexes in (op.get("inputIndexes", []), op.setdefault("outputIndexes", [])):
        if not isinstance(indexes, list) or not all(type(i) is int and -1 <= i < tensors for i in indexes):
            raise ValueError(f"{op['name']} has inputs or outputs that are no tensors of the graph")
    if op["type"] == "Input" and not op["outputIndexes"]:
        raise ValueError(f"{op['name']} is an input without an output tensor")
    main = op.get("main")
    external = main.get("external") if isinstance(main, dict) else None
    if external and (len(external) < 2 or not all(type(n) is int and 0 <= n < 1 << 62 for n in external)):
        raise ValueError(f"{op['name']} has weights at {external}, which are no offset and sizes")


class Graph:
    """An MNN model without its weights; `content` is its JSON form."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    @classmethod
    def checked(cls, content: Any) -> Graph:
        """Check an untrusted JSON form; raise ValueError for missing names, types or tensors, or impossible offsets."""
        if not isinstance(content, dict) or not all(
            _is_names(content.get(key)) for key in ("tensorName", "outputName")
        ):
            raise ValueError("it has no names of tensors")
        if not isinstance(content.get("oplists"), list) or not content["oplists"]:
            raise ValueError("it has no operators")
        for op in content["oplists"]:
            _check_op(op, len(content["tensorName"]))
        return cls(content)

    def save(self, path: Path) -> None:
        """Write the JSON form, with its order of keys: the bytes of the .mnn file depend on it."""
        path.write_text(json.dumps(self.content, separators=(",", ":")) + "\n")

    @property
    def ops(self) -> list[Op]:
        """Operators in the order of execution."""
        return self.content["oplists"]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [op["name"] for op in self.ops if op["type"] == "Input"]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return list(self.content["outputName"])

    def of_type(self, *types: str) -> list[Op]:
        """Return the operators of these types."""
        return [op for op in self.ops if op["type"] in types]

    @property
    def fused(self) -> list[Op]:
        """Attention operators of the engine that keep the KV cache."""
        return [op for op in self.of_type("Attention") if op["main"]["kv_cache"]]

    def drop_unused_inputs(self) -> None:
        """Remove inputs without consumers: `past_key_values` once every attention is fused."""
        used = {index for op in self.ops for index in op.get("inputIndexes", [])}
        self.content["oplists"] = [op for op in self.ops if op["type"] != "Input" or op["outputIndexes"][0] in used]

    @property
    def rotary_norms(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Normalizations inside RoPE operators, with the names of their modules."""
        for op in self.of_type("RoPE"):
            main = op.get("main") or {}
            attention = op["name"].rpartition(".")[0]
            yield from ((f"{attention}.{name}", main[name]) for name in ROTARY_NORMS if main.get(name))

    def restore_constants(self, values: dict[str, np.ndarray], rounded_only: bool = False) -> None:
        """Replace float constants by their exact values.

        The converter's JSON has six decimals, and its `--fp16` stores constants as float16. Rotary frequencies go down
        to 1e-6 and are multiplied by positions, so either is too coarse. `values` are those of the ONNX graph, float32,
        by name. `rounded_only` restricts this to constants that are these values, rounded by the converter's JSON.
        """
        constants = [op for op in self.of_type("Const") if op["main"]["dataType"] in ("DT_FLOAT", "DT_HALF")]
        floats = [(op["name"], op["main"], "float32s") for op in constants]
        floats += [(f"{name}.weight", norm, "gamma") for name, norm in self.rotary_norms]
        for name, table, key in floats:
            exact = values.get(name)
            if exact is None:
                continue
            if rounded_only:
                rounded = np.array(table.get(key, []))
                if rounded.size != exact.size or np.abs(rounded - exact.reshape(-1)).max(initial=0) >= DUMP_ERROR:
                    continue
            table[key] = [float(value) for value in exact.reshape(-1)]
            if "dataType" in table:
                table.pop("uint8s", None)
                table["dataType"] = "DT_FLOAT"

    def _producers(self) -> dict[str, tuple[Op, int]]:
        """Return the operator and the index of the tensor that holds each value of the ONNX graph, by the value's name.

        A linear layer is a convolution between two changes of layout. The converter moves an activation that follows
        in between, so the tensor with the layer's name may hold the activation's output. The convolution's output is
        the layer's.
        """
        names = self.content["tensorName"]
        producers = {names[index]: (op, index) for op in self.ops for index in op["outputIndexes"]}
        linear = {op["name"].removesuffix(LINEAR): (op, op["outputIndexes"][0]) for op in self.of_type("Convolution")}
        return producers | {name: producer for name, producer in linear.items() if name in producers}

    @property
    def values(self) -> set[str]:
        """Names of all values that operators compute."""
        return set(self._producers())

    def with_outputs(self, values: list[str]) -> tuple[Graph, dict[str, str]]:
        """Return a copy of the graph with further outputs, and the names of these outputs by value.

        Shapes may differ from those of the ONNX graph by axes of size 1 and by merged axes.
        """
        graph, producers, copies = Graph(copy.deepcopy(self.content)), self._producers(), defaultdict(list)
        builder, outputs = Builder(graph), {value: f"{value}/output" for value in sorted(values)}
        for value, output in outputs.items():
            op, index = producers[value]
            is_nc4hw4 = op["type"] == "Convolution" or op["defaultDimentionFormat"] == NC4HW4
            # RoPE gives [1, tokens, heads, head_dim] with channels last; these are copied unchanged.
            plain = "NHWC" if op["type"] == "RoPE" else "NCHW"
            builder.convert_layout(output, NC4HW4 if is_nc4hw4 else plain, plain, index)
            copies[op["name"]].append(builder.ops[-1])
        graph.content["oplists"] = [each for op in graph.ops for each in (op, *copies.get(op["name"], []))]
        graph.content["outputName"] += outputs.values()
        return graph, outputs

    def weights(self) -> list[WeightInfo]:
        """Return the storage of each convolution's weight, in the order of the graph."""
        return [_weight_info(op) for op in self.of_type("Convolution")]

    def external_ends(self) -> dict[str, int]:
        """Return the offset after the last byte in the weight file of each operator that has data there, by name."""
        external = {op["name"]: op["main"].get("external") for op in self.ops if isinstance(op.get("main"), dict)}
        return {name: span[0] + sum(span[1:]) for name, span in external.items() if span}

    def external_size(self) -> int:
        """Return the smallest possible size of the weight file in bytes."""
        return max(self.external_ends().values(), default=0)


class Builder:
    """Adds operators to a list of its own, and their output tensors to a graph."""

    def __init__(self, graph: Graph) -> None:
        self.names = graph.content["tensorName"]
        self.ops: list[Op] = []

    def tensor(self, name: str) -> int:
        """Add a tensor and return its index."""
        self.names.append(name)
        return len(self.names) - 1

    def add(
        self, kind: str, main: Any, name: str, inputs: list[int], outputs: list[int] | None = None, layout: str = "NHWC"
    ) -> int:
        """Add an operator with an output in `layout`, by default a new tensor of its name; return its last output."""
        outputs = outputs or [self.tensor(name)]
        # Keys in the order of the converter's dump: the bytes of a .mnn file depend on it.
        op = {"inputIndexes": inputs, "main_type": MAIN_TYPES.get(kind, kind), "main": main, "name": name}
        self.ops.append(op | {"outputIndexes": outputs, "type": kind, "defaultDimentionFormat": layout})
        return outputs[-1]

    def reshape(self, name: str, dims: list[int], source: int, outputs: list[int] | None = None) -> int:
        """Add a Reshape; -1 in `dims` stands for the rest, 0 for the size of that axis of the input."""
        return self.add("Reshape", {"dims": dims, "dimType": "NCHW"}, name, [source], outputs)

    def convert_layout(self, name: str, source_layout: str, layout: str, source: int) -> int:
        """Add a ConvertTensor from one layout to another."""
        return self.add("ConvertTensor", {"source": source_layout, "dest": layout}, name, [source])


def _weight_info(op: Op) -> WeightInfo:
    main = op["main"]
    common, stored, external = main["common"], main.get("quanParameter"), main.get("external", [0, 0, 0])
    outputs, kernel, size = common["outputCount"], common["kernelX"] * common["kernelY"], sum(external[1:])
    inputs = common["inputCount"] * kernel
    if stored is None or stored["type"] == FLOAT16:
        bits = 16 if stored else 32
        return WeightInfo(op["name"], inputs, outputs, kernel, bits, 0, True, 32, size)
    symmetric = stored["readType"] == 0
    scale_bits = 16 if stored["scaleStorage"] == "FP16" else 32
    blocks = external[2] // (scale_bits // 8) // (1 if symmetric else 2) // outputs
    block = inputs // blocks if blocks > 1 else 0
    return WeightInfo(op["name"], inputs, outputs, kernel, stored["aMaxOrBits"], block, symmetric, scale_bits, size)


def check_supported(graph: Graph, name: str) -> None:
    """Raise ConversionError for an operator that the engine lacks, and the converter passed on."""
    unsupported = [f"{op['type']} {op['name']}" for op in graph.of_type(*UNSUPPORTED_OPERATORS)]
    if unsupported:
        raise ConversionError(f"{name} has operators that MNN does not support: {', '.join(unsupported[:3])}")


def check_fused(graph: Graph, name: str, layers: int) -> None:
    """Check that every attention is MNN's own operator with `kv_cache`: the engine keeps the cache itself.

    Raise ConversionError if an attention is not fused, or the graph still has the input `past_key_values`.
    """
    fused, has_past = len(graph.fused), "past_key_values" in graph.inputs
    if has_past or fused != layers:
        cause = "the operators of an attention in the ONNX graph are not the sequence that the converter fuses"
        if not fused:
            cause = "it was converted without --transformerFuse"
        raise ConversionError(
            f"{name} {'has the input past_key_values and ' if has_past else ''}has {fused} of {layers} attentions fused"
            f" with a KV cache: {cause}; the engine would stop with 'past_key_values tensor is input but not found' or"
            " answer wrongly. Convert the ONNX graphs of 'hf2mnn export' with --transformerFuse, as 'hf2mnn convert'"
            " does"
        )


def check_size(graph: Graph, file: str, size: int) -> None:
    """Raise ConversionError if a weight file of `size` bytes is too short; name the first operator without data."""
    missing = {end: operator for operator, end in graph.external_ends().items() if end > size}
    if missing:
        first = missing[min(missing)].removesuffix(LINEAR)
        raise ConversionError(
            f"{file} has {size} bytes, but the graph reads {graph.external_size()}: it is truncated, and {first} has no"
            " weight; make it again"
        )
