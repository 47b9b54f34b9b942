"""Linear layers: opaque operators while MNN's converter runs, and 1 x 1 convolutions in the graph afterwards.

The converter would copy every weight as float32 through memory and disk, and add operators that compute shapes around
each layer. So `strip_linear_layers` removes the weights from its input, and `restore_linear_layers` builds MNN's form
of a linear layer: a 1 x 1 convolution over [tokens, channels, 1, 1]. Its bias is in the weight file; its weight has
size 0 there, and the quantize stage takes it from the files of the ONNX graph.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.graph import LINEAR, NC4HW4, Graph, Op, convert_layout, operator, reshape
from hf2mnn.onnx.initializers import Matrices

DOMAIN, OPERATOR = "hf2mnn", "Linear"
OUTPUTS, INPUTS, RANK, BIAS = "out_features", "in_features", "rank", "bias"
"""Attributes of the opaque operator: sizes, axes of the input, and the name of the initializer of the bias."""


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Return the number of axes of each value."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}


def strip_linear_layers(model: onnx.ModelProto) -> None:
    """Replace each MatMul with a constant weight and each Gemm, with its bias, by an opaque operator."""
    matrices, ranks = Matrices(model), _ranks(model)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    initializers, nodes, merged = matrices.initializers, [], set()
    for node in model.graph.node:
        shape = matrices.shape(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if shape is None:
            if id(node) not in merged:
                nodes.append(node)
            continue
        transposed = node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
        inputs, outputs = shape[::-1] if transposed else shape
        output, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
        next_ops = consumers.get(output, [])
        if not bias and len(next_ops) == 1 and next_ops[0].op_type == "Add":
            biases = [n for n in next_ops[0].input if n in initializers and list(initializers[n].dims) == [outputs]]
            if biases:
                bias, output = biases[0], next_ops[0].output[0]
                merged.add(id(next_ops[0]))
        attributes = {INPUTS: inputs, OUTPUTS: outputs, RANK: ranks[node.input[0]], BIAS: bias}
        nodes.append(helper.make_node(OPERATOR, [node.input[0]], [output], output, domain=DOMAIN, **attributes))
    _replace_nodes(model, nodes)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph, without those whose outputs are not used, and drop unused initializers."""
    outputs = {value.name for value in model.graph.output}
    while True:
        used = Counter(name for node in nodes for name in node.input)
        needed = [node for node in nodes if any(name in used or name in outputs for name in node.output)]
        if len(needed) == len(nodes):
            break
        nodes = needed
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(initializers)


def _attributes(op: Op) -> dict[str, Any]:
    return {item["key"]: item.get("s", item["i"]) for item in op["main"]["attr"]}


class _Builder:
    """Builds convolutions with the changes of layout around them.

    Attributes:
        names: Names of the graph's tensors.
        inputs: Tensors in NC4HW4 by their source tensors; layers with the same input share them.
    """

    def __init__(self, graph: Graph) -> None:
        self.names = graph.content["tensorName"]
        self.inputs: dict[int, int] = {}

    def _tensor(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def convolution(self, op: Op, external: list[int]) -> list[Op]:
        """Build the operators from [..., tokens, inputs] to [tokens, inputs, 1, 1], the convolution, and back."""
        attributes, name, (source,) = _attributes(op), op["name"], op["inputIndexes"]
        inputs, outputs, ops = attributes[INPUTS], attributes[OUTPUTS], []
        if source not in self.inputs:
            flat, self.inputs[source] = self._tensor(f"{name}__flat"), self._tensor(f"{name}__packed")
            ops.append(reshape(f"{name}__flat", [-1, inputs, 1, 1], source, flat))
            ops.append(convert_layout(f"{name}__packed", "NCHW", NC4HW4, flat, self.inputs[source]))
        convolved, plain = self._tensor(f"{name}{LINEAR}"), self._tensor(f"{name}__unpacked")
        common = {"padX": 0, "padY": 0, "kernelX": 1, "kernelY": 1, "strideX": 1, "strideY": 1, "dilateX": 1}
        common |= {"dilateY": 1, "padMode": "CAFFE", "group": 1, "outputCount": outputs, "inputCount": inputs}
        common |= {"relu": False, "relu6": False, "hasOutputShape": False}
        main = {"common": common, "external": external}
        source = self.inputs[source]
        ops.append(operator("Convolution", "Convolution2D", main, f"{name}{LINEAR}", [source], [convolved]))
        ops.append(convert_layout(f"{name}__unpacked", NC4HW4, "NCHW", convolved, plain))
        dims = [1] * (attributes[RANK] - 2) + [-1, outputs]
        return [*ops, reshape(name, dims, plain, op["outputIndexes"][0])]


def restore_linear_layers(graph: Graph, weights: Path, biases: dict[str, np.ndarray]) -> None:
    """Replace the opaque operators of a graph by MNN's own, and append their `biases` to its weight file.

    Biases are float32 [outputs] by the names of their initializers.

    Raises:
        ConversionError: The converter changed an opaque operator.
    """
    builder, ops = _Builder(graph), []
    with weights.open("ab") as file:
        file.seek(0, 2)
        for op in graph.ops:
            if op["type"] != "Extra" or op["main"].get("type") != OPERATOR:
                ops.append(op)
                continue
            attributes = _attributes(op)
            if not {INPUTS, OUTPUTS, RANK} <= set(attributes) or len(op["inputIndexes"]) != 1:
                raise ConversionError(
                    f"MNN's converter changed the linear layer {op['name']}; this is a bug, report it"
                )
            outputs = attributes[OUTPUTS]
            bias = biases[attributes[BIAS]] if attributes[BIAS] else np.zeros(outputs, np.float32)
            ops += builder.convolution(op, [file.tell(), 0, bias.nbytes])
            file.write(bias.astype(np.float32).tobytes())
    graph.content["oplists"] = ops
