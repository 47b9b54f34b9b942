"""What is really inside a .mnn file, and the proofs that a conversion did what it said.

`Graph.content` is the JSON form of MNN's flatbuffer schema (schema/default/MNN.fbs), as its converter dumps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf2mnn.errors import ConversionError

# Ops that stand for something that the converter did not understand.
UNSUPPORTED = ("Extra", "Plugin")
FLOAT16 = 3
"""`quanParameter.type` of weights stored as half floats."""


@dataclass(frozen=True)
class WeightInfo:
    """How one linear layer's weight is stored. `block` is 0 for one scale an output channel; `kernel` is 1 but for the
    vision tower's patch embedding; `size` in bytes."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    bits: int
    block: int
    symmetric: bool
    scale_bits: int
    size: int


class Graph:
    """Read-only questions about a model, and the one edit that conversion needs."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

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

    def drop_unused_inputs(self) -> None:
        """Remove inputs that nothing reads: what is left of `past_key_values` once every attention is fused."""
        read = {index for op in self.ops for index in op.get("inputIndexes", [])}
        self.content["oplists"] = [op for op in self.ops if op["type"] != "Input" or op["outputIndexes"][0] in read]

    def weights(self) -> list[WeightInfo]:
        """Every convolution (MNN's form of a linear layer) in the order of the graph."""
        return [_weight_info(op) for op in self.of_type("Convolution")]

    def external_size(self) -> int:
        """Bytes that the weight file must have at least."""
        ends = [0]
        for op in self.ops:
            external = op.get("main", {}).get("external") if isinstance(op.get("main"), dict) else None
            if external:
                ends.append(external[0] + sum(external[1:]))
        return max(ends)


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
    fused = sum(bool(op["main"]["kv_cache"]) for op in graph.of_type("Attention"))
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
    """Raises ConversionError where the weight file has not the bytes that the graph points to."""
    if size < graph.external_size():
        raise ConversionError(
            f"{name}.weight has {size} bytes, the graph reads {graph.external_size()}: it was cut short"
        )
