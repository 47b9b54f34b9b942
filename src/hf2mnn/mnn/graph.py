"""What is really inside a .mnn file, and the proofs that a conversion did what it said.

`Graph.content` is the JSON form of MNN's flatbuffer schema (schema/default/MNN.fbs), as its converter dumps it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.build import change_layout

# Ops that stand for something that the converter did not understand.
UNSUPPORTED = ("Extra", "Plugin")
LINEAR = "__matmul_converted"
"""What the converter adds to the name of a linear layer's value to name the convolution that it becomes."""
PACKED = "NC4HW4"
"""Layout of what convolutions read and write: four channels side by side."""
ROTARY_NORMS = ("q_norm", "k_norm")
"""Normalizations that a RoPE operator does itself: tables of its own, whose gamma is in the graph."""
FLOAT16 = 3
"""`quanParameter.type` of weights stored as half floats."""


@dataclass(frozen=True)
class WeightInfo:
    """How one linear layer's weight is stored. `block` is 0 for one scale an output channel; `kernel` is 1 but for the
    vision tower's patch embedding; `size` in bytes.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int
    bits: int
    block: int
    symmetric: bool
    scale_bits: int
    size: int


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _check_op(op: Any, tensors: int) -> None:
    if isinstance(op, dict) and type(op.get("type")) is int:
        # What the converter's dump gives for a type that has no name in its schema.
        op["type"] = str(op["type"])
    if not isinstance(op, dict) or not all(isinstance(op.get(key), str) for key in ("name", "type")):
        raise ValueError("it has an operator without name and type")
    for indexes in (op.get("inputIndexes", []), op.setdefault("outputIndexes", [])):
        if not isinstance(indexes, list) or not all(type(i) is int and -1 <= i < tensors for i in indexes):
            raise ValueError(f"{op['name']} reads or gives tensors that are not there")
    if op["type"] == "Input" and not op["outputIndexes"]:
        raise ValueError(f"{op['name']} is an input that gives nothing")
    main = op.get("main")
    place = main.get("external") if isinstance(main, dict) else None
    if place and (len(place) < 2 or not all(type(number) is int and 0 <= number < 1 << 62 for number in place)):
        raise ValueError(f"{op['name']} has its weights at {place}, which cannot be")


class Graph:
    """Questions about a model, and the edits that are needed."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    @classmethod
    def checked(cls, content: Any) -> Graph:
        """Of a file that anyone may have made.

        Raises:
            ValueError: the operators have no names, types and tensors, or places in the weight file that can be.
        """
        if (
            not isinstance(content, dict)
            or not _texts(content.get("tensorName"))
            or not _texts(content.get("outputName"))
        ):
            raise ValueError("it names no tensors")
        if not isinstance(content.get("oplists"), list) or not content["oplists"]:
            raise ValueError("it has no operators")
        for op in content["oplists"]:
            _check_op(op, len(content["tensorName"]))
        return cls(content)

    @property
    def ops(self) -> list[dict[str, Any]]:
        return self.content["oplists"]

    @property
    def inputs(self) -> list[str]:
        return [op["name"] for op in self.ops if op["type"] == "Input"]

    @property
    def outputs(self) -> list[str]:
        return list(self.content["outputName"])

    def of_type(self, *types: str) -> list[dict[str, Any]]:
        return [op for op in self.ops if op["type"] in types]

    @property
    def fused(self) -> list[dict[str, Any]]:
        """Attentions that are the engine's own operator and keep the KV cache."""
        return [op for op in self.of_type("Attention") if op["main"]["kv_cache"]]

    @property
    def nc4hw4(self) -> bool:
        """Whether a decoder is in the NC4HW4 layout, whose rotations are operators of their own."""
        return bool(self.of_type("RoPE"))

    def drop_unused_inputs(self) -> None:
        """Remove inputs that nothing reads: what is left of `past_key_values` once every attention is fused."""
        read = {index for op in self.ops for index in op.get("inputIndexes", [])}
        self.content["oplists"] = [op for op in self.ops if op["type"] != "Input" or op["outputIndexes"][0] in read]

    @property
    def rotary_norms(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Normalizations of queries and keys that their rotation does, with the names of their modules."""
        for op in self.of_type("RoPE"):
            held = op.get("main") or {}
            attention = op["name"].rpartition(".")[0]
            yield from ((f"{attention}.{name}", held[name]) for name in ROTARY_NORMS if held.get(name))

    def _floats(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Names of the float values that the graph holds itself, with the tables and keys that they are under."""
        for op in self.of_type("Const"):
            if op["main"]["dataType"] in ("DT_FLOAT", "DT_HALF"):
                yield op["name"], op["main"], "float32s"
        for name, norm in self.rotary_norms:
            yield f"{name}.weight", norm, "gamma"

    def restore_constants(self, values: dict[str, np.ndarray]) -> None:
        """Give constants, and what else the graph holds, the values that they have in the ONNX graph, float32 by name.

        The converter's dump prints floats with six decimals, and `--fp16` stores them as half floats: of rotary
        frequencies, which go down to 1e-6 and are multiplied by positions, either leaves little.
        """
        for name, table, key in self._floats():
            if (exact := values.get(name)) is None:
                continue
            table[key] = [float(value) for value in exact.reshape(-1)]
            if "dataType" in table:
                table.pop("uint8s", None)
                table["dataType"] = "DT_FLOAT"

    def sharpen_constants(self, values: dict[str, np.ndarray]) -> None:
        """Undo the rounding of the dump where `values` are what was rounded; what differs otherwise stays as it is."""
        near = {}
        for name, table, key in self._floats():
            exact, kept = values.get(name), table.get(key, [])
            fits = exact is not None and len(kept) == exact.size
            if fits and np.abs(np.array(kept) - exact.reshape(-1)).max(initial=0) < 1e-6:
                near[name] = exact
        self.restore_constants(near)

    def _producers(self) -> dict[str, tuple[dict[str, Any], int]]:
        """The op that computes a value of the ONNX graph, and the tensor's index, by the value's name.

        A linear layer is a convolution between changes of layout, and the converter moves what follows into that
        sandwich: the tensor with the layer's name may hold the activation after it. So the convolution is taken.
        """
        names = self.content["tensorName"]
        found = {names[index]: (op, index) for op in self.ops for index in op["outputIndexes"]}
        linear = {op["name"].removesuffix(LINEAR): (op, op["outputIndexes"][0]) for op in self.of_type("Convolution")}
        return found | {name: at for name, at in linear.items() if name in found}

    @property
    def values(self) -> set[str]:
        """Names of everything that an op computes."""
        return set(self._producers())

    def watched(self, values: list[str]) -> tuple[Graph, dict[str, str]]:
        """A copy of the graph that also gives `values`, and the names under which it does; shapes may differ from the
        ONNX graph's by axes of size 1 and by axes joined.
        """
        content, producers = copy.deepcopy(self.content), self._producers()
        names, after, given = content["tensorName"], {}, {}
        for value in sorted(values):
            op, index = producers[value]
            given[value] = copied = f"{value}/watched"
            names.append(copied)
            packed = op["type"] == "Convolution" or op["defaultDimentionFormat"] == PACKED
            # Queries and keys come out as [1, tokens, heads, size] with channels last, and are copied as they are.
            plain = "NHWC" if op["type"] == "RoPE" else "NCHW"
            read = change_layout(copied, PACKED if packed else plain, plain, index, len(names) - 1)
            after.setdefault(op["name"], []).append(read)
        content["oplists"] = [made for op in content["oplists"] for made in (op, *after.get(op["name"], []))]
        content["outputName"] = [*content["outputName"], *given.values()]
        return Graph(content), given

    def weights(self) -> list[WeightInfo]:
        """Every convolution (MNN's form of a linear layer) in the order of the graph."""
        return [_weight_info(op) for op in self.of_type("Convolution")]

    def external_ends(self) -> dict[str, int]:
        """Where in the weight file the last byte of each operator that has something there must be, by name."""
        external = {op["name"]: op["main"].get("external") for op in self.ops if isinstance(op.get("main"), dict)}
        return {name: place[0] + sum(place[1:]) for name, place in external.items() if place}

    def external_size(self) -> int:
        """Bytes that the weight file must have at least."""
        return max(self.external_ends().values(), default=0)


def _weight_info(op: dict[str, Any]) -> WeightInfo:
    main = op["main"]
    common, quantized = main["common"], main.get("quanParameter")
    outputs = common["outputCount"]
    kernel = common["kernelX"] * common["kernelY"]
    inputs = common["inputCount"] * kernel
    external = main.get("external", [0, 0, 0])
    size = sum(external[1:])
    if quantized is None:
        return WeightInfo(op["name"], inputs, outputs, kernel, 32, 0, True, 32, size)
    if quantized["type"] == FLOAT16:
        return WeightInfo(op["name"], inputs, outputs, kernel, 16, 0, True, 32, size)
    symmetric = quantized["readType"] == 0
    scale_bits = 16 if quantized["scaleStorage"] == "FP16" else 32
    scales = external[2] // (scale_bits // 8) // (1 if symmetric else 2)
    blocks = scales // outputs
    block = inputs // blocks if blocks > 1 else 0
    return WeightInfo(op["name"], inputs, outputs, kernel, quantized["aMaxOrBits"], block, symmetric, scale_bits, size)


def prove_supported(graph: Graph, name: str) -> None:
    """Raises ConversionError where an op was passed through that the engine has no code for."""
    left = [f"{op['type']} {op['name']}" for op in graph.of_type(*UNSUPPORTED)]
    if left:
        raise ConversionError(f"{name} holds ops that the engine does not have: {', '.join(left[:3])}")


def prove_fused(graph: Graph, name: str, layers: int) -> None:
    """The engine keeps the KV cache itself, so every attention must be MNN's own operator with `kv_cache`.

    Raises:
        ConversionError: with the cause and the cure.
    """
    fused = len(graph.fused)
    if "past_key_values" in graph.inputs or fused != layers:
        cause = (
            "it was converted without --transformerFuse"
            if fused == 0
            else "an attention in the ONNX graph is not the chain of ops that the converter looks for"
        )
        asks = "still asks for past_key_values, and " if "past_key_values" in graph.inputs else ""
        raise ConversionError(
            f"{name} {asks}has {fused} of {layers} attentions fused with a KV cache: {cause}; the engine would stop"
            " with 'past_key_values tensor is input but not found' or answer wrongly. Convert the ONNX of 'hf2mnn onnx'"
            " with --transformerFuse ('hf2mnn mnn' does)"
        )


def prove_weights(graph: Graph, name: str, bits: int, block: int, symmetric: bool, scale_bits: int) -> None:
    """Every linear layer is stored as asked; the converter falls back to other bits and blocks without a word.

    Raises:
        ConversionError: naming the first layer that is not, and how it is.
    """
    for weight in graph.weights():
        if bits >= 16:
            right = weight.bits == bits
        else:
            # One scale a channel is what a block as long as the layer is, and all that MNN has for a patch embedding,
            # whose three input channels no block divides.
            blocks = {block, 0} if weight.inputs == block or weight.kernel > 1 else {block}
            stored = (weight.bits, weight.symmetric, weight.scale_bits)
            right = stored == (bits, symmetric, scale_bits) and weight.block in blocks
        if not right:
            raise ConversionError(
                f"{name}: layer {weight.name} ({weight.inputs} inputs) is stored with {weight.bits} bits, block"
                f" {weight.block or 'channel'}, where {bits} bits, block {block or 'channel'} were asked for; use a"
                " block that is a multiple of 16 and divides the layer's inputs"
            )


def prove_size(graph: Graph, name: str, size: int) -> None:
    """Raises ConversionError where the weight file has not the bytes that the graph points to, with the first operator
    whose are not there.
    """
    beyond = {end: operator for operator, end in graph.external_ends().items() if end > size}
    if beyond:
        first = beyond[min(beyond)].removesuffix(LINEAR)
        raise ConversionError(
            f"{name}.weight has {size} bytes, the graph reads {graph.external_size()}: it was cut short, and {first}"
            " has no weight; make it again"
        )
