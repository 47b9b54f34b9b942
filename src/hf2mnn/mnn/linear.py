"""Linear layers, which go through MNN's converter as operators that it does not look into, and come out as MNN's form
of them: a convolution of 1 x 1 over as many images of one pixel as there are tokens.

The converter would carry a float32 copy of every weight through memory and disk, and surround each layer by operators
that work out shapes. So it is shown no weight of a linear layer at all. In the graph that is left, such a convolution
has a bias in the weight file and no weight (its size there is 0): whoever writes a bundle takes that from the ONNX
graph's own files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.build import Op, change_layout, operator, reshape
from hf2mnn.mnn.graph import LINEAR, PACKED, Graph
from hf2mnn.onnx.initializers import Matrices

DOMAIN, OPERATOR = "hf2mnn", "Linear"
OUTPUTS, INPUTS, RANK, BIAS = "out_features", "in_features", "rank", "bias"
"""Attributes of the operator; `bias` is the name of an initializer."""


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Number of axes of each value."""
    known = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in known}


def hide_linear_layers(model: onnx.ModelProto) -> None:
    """Put one opaque operator in the place of each MatMul with a weight, or Gemm, together with its bias."""
    matrices, ranks = Matrices(model), _ranks(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    biases, kept, gone = matrices.initializers, [], set()
    for node in model.graph.node:
        shape = matrices.shape(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if shape is None:
            if id(node) not in gone:
                kept.append(node)
            continue
        turned = node.op_type == "Gemm" and any(held.name == "transB" and held.i for held in node.attribute)
        inputs, outputs = shape[::-1] if turned else shape
        output, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
        follows = readers.get(output, [])
        if not bias and len(follows) == 1 and follows[0].op_type == "Add":
            added = [name for name in follows[0].input if name in biases and list(biases[name].dims) == [outputs]]
            if added:
                bias, output = added[0], follows[0].output[0]
                gone.add(id(follows[0]))
        attributes = {INPUTS: inputs, OUTPUTS: outputs, RANK: ranks[node.input[0]], BIAS: bias}
        kept.append(helper.make_node(OPERATOR, [node.input[0]], [output], output, domain=DOMAIN, **attributes))
    _keep(model, kept)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _keep(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Leave in the graph these nodes, but for those that nobody reads now, and the initializers that they read."""
    outputs = {value.name for value in model.graph.output}
    while True:
        read = Counter(name for node in nodes for name in node.input)
        left = [node for node in nodes if any(name in read or name in outputs for name in node.output)]
        if len(left) == len(nodes):
            break
        nodes = left
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)


def _attributes(op: Op) -> dict[str, Any]:
    return {held["key"]: held.get("s", held["i"]) for held in op["main"]["attr"]}


class _Layout:
    """Builds the operators around convolutions. Layers that read the same share what brings it into their layout."""

    def __init__(self, graph: Graph) -> None:
        self.names = graph.content["tensorName"]
        self.packed: dict[int, int] = {}

    def _value(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def convolution(self, op: Op, external: list[int]) -> list[Op]:
        """[..., tokens, inputs] to [tokens, inputs, 1, 1], convolved, and back."""
        held, name, (read,) = _attributes(op), op["name"], op["inputIndexes"]
        inputs, outputs, made = held[INPUTS], held[OUTPUTS], []
        if read not in self.packed:
            flat, self.packed[read] = self._value(f"{name}__flat"), self._value(f"{name}__packed")
            made.append(reshape(f"{name}__flat", [-1, inputs, 1, 1], read, flat))
            made.append(change_layout(f"{name}__packed", "NCHW", PACKED, flat, self.packed[read]))
        convolved, unpacked = self._value(f"{name}{LINEAR}"), self._value(f"{name}__unpacked")
        common = {"padX": 0, "padY": 0, "kernelX": 1, "kernelY": 1, "strideX": 1, "strideY": 1, "dilateX": 1}
        common |= {"dilateY": 1, "padMode": "CAFFE", "group": 1, "outputCount": outputs, "inputCount": inputs}
        common |= {"relu": False, "relu6": False, "hasOutputShape": False}
        main = {"common": common, "external": external}
        read = self.packed[read]
        made.append(operator("Convolution", "Convolution2D", main, f"{name}{LINEAR}", [read], [convolved]))
        made.append(change_layout(f"{name}__unpacked", PACKED, "NCHW", convolved, unpacked))
        dims = [1] * (held[RANK] - 2) + [-1, outputs]
        return [*made, reshape(name, dims, unpacked, op["outputIndexes"][0])]


def show_linear_layers(graph: Graph, weights: Path, biases: dict[str, np.ndarray]) -> None:
    """Put MNN's own operators in the place of the opaque ones, and append their biases to the weight file.

    `biases` are float32 [outputs], by the names of their initializers.

    Raises:
        ConversionError: an operator did not come through the converter as it went in.
    """
    layout, made = _Layout(graph), []
    with weights.open("ab") as file:
        file.seek(0, 2)
        for op in graph.ops:
            if op["type"] != "Extra" or op["main"].get("type") != OPERATOR:
                made.append(op)
                continue
            held = _attributes(op)
            if not {INPUTS, OUTPUTS, RANK} <= set(held) or len(op["inputIndexes"]) != 1:
                raise ConversionError(
                    f"MNN's converter changed the linear layer {op['name']}; this is a bug, report it"
                )
            bias = biases[held[BIAS]] if held[BIAS] else np.zeros(held[OUTPUTS], np.float32)
            made += layout.convolution(op, [file.tell(), 0, bias.nbytes])
            file.write(bias.astype(np.float32).tobytes())
    graph.content["oplists"] = made
