"""Adapt ONNX graphs to MNN: inputs and outputs to its LLM engine, and linear layers to its converter.

The converter would copy every weight of a linear layer as float32 through memory and disk, and add operators that
compute shapes around each layer. So it gets opaque operators without weights. `restore_linear_layers` builds MNN's form
of a linear layer afterwards: a 1 x 1 convolution over [tokens, channels, 1, 1]. Its bias is in the weight file; its
weight has size 0 there, and the quantize stage takes it from the files of the ONNX graph.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hf2mnn.core.errors import ConversionError
from hf2mnn.mnn.graph import LINEAR, NC4HW4, Builder, Graph, Op
from hf2mnn.onnx.initializers import Matrices

FLAT = "_flat"  # suffix of an output before it gets the shape that the engine requires
DOMAIN, OPERATOR = "hf2mnn", "Linear"
OUTPUTS, INPUTS, RANK, BIAS = "out_features", "in_features", "rank", "bias"
"""Attributes of the opaque operator: sizes, axes of the input, and the name of the initializer of the bias."""


def adapt_decoder(model: onnx.ModelProto) -> None:
    """Replace `inputs_embeds` [1, tokens, hidden] by `input_ids` [tokens, 1, hidden], the input that `llm.cpp` feeds.

    The output `presents` is removed: the engine keeps the KV cache itself. Once every attention is fused, nothing uses
    `past_key_values` either; if that input remains, an attention is not fused.
    """
    embeds = next(value for value in model.graph.input if value.name == "inputs_embeds")
    model.graph.value_info.append(embeds)
    dims = embeds.type.tensor_type.shape.dim
    shape = [dims[1].dim_param, 1, dims[2].dim_value]
    embeds.CopyFrom(helper.make_tensor_value_info("input_ids", onnx.TensorProto.FLOAT, shape))
    del model.graph.output[[value.name for value in model.graph.output].index("presents")]
    model.graph.node.insert(0, helper.make_node("Transpose", ["input_ids"], ["inputs_embeds"], perm=[1, 0, 2]))


def adapt_vision(model: onnx.ModelProto) -> None:
    """Reshape `image_embeds` [image tokens, hidden] to [image tokens, 1, hidden], which `omni.cpp` inserts into text.

    The outputs for deepstack keep their shapes.
    """
    output = model.graph.output[0]
    dims = output.type.tensor_type.shape.dim
    shape = [dims[0].dim_param, 1, dims[1].dim_value]
    flat, axis = f"{output.name}{FLAT}", f"{output.name}_axis"
    for node in model.graph.node:
        node.input[:] = [flat if name == output.name else name for name in node.input]
        node.output[:] = [flat if name == output.name else name for name in node.output]
    output.CopyFrom(helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, shape))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), axis))
    model.graph.node.append(helper.make_node("Unsqueeze", [flat, axis], [output.name]))


def strip_linear_layers(model: onnx.ModelProto) -> None:
    """Replace each MatMul with a constant weight and each Gemm, with its bias, by an opaque operator."""
    graph, matrices = model.graph, Matrices(model)
    values = [*graph.input, *graph.output, *graph.value_info]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    consumers = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    initializers, nodes, merged = matrices.initializers, [], set()
    for node in graph.node:
        shape = matrices.shape(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if shape is None:
            if id(node) not in merged:
                nodes.append(node)
            continue
        transposed = node.op_type == "Gemm" and any(item.name == "transB" and item.i for item in node.attribute)
        inputs, outputs = shape[::-1] if transposed else shape
        output, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
        next_ops = consumers[output]
        if not bias and len(next_ops) == 1 and next_ops[0].op_type == "Add":
            biases = [n for n in next_ops[0].input if n in initializers and list(initializers[n].dims) == [outputs]]
            if biases:
                bias, output = biases[0], next_ops[0].output[0]
                merged.add(id(next_ops[0]))
        attributes = {INPUTS: inputs, OUTPUTS: outputs, RANK: ranks[node.input[0]], BIAS: bias}
        nodes.append(helper.make_node(OPERATOR, [node.input[0]], [output], output, domain=DOMAIN, **attributes))
    _replace_nodes(graph, nodes)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph, without those whose outputs are not used, and drop unused initializers."""
    used, needed = {value.name for value in graph.output}, []
    for node in reversed(nodes):
        if used.intersection(node.output):
            needed.append(node)
            used.update(node.input)
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(needed))
    graph.initializer.extend(initializers)


class _LinearBuilder(Builder):
    """Builds convolutions with the changes of layout around them."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.inputs: dict[int, int] = {}  # tensors in NC4HW4 by their source tensors; layers share them

    def convolution(self, op: Op, attributes: dict[str, Any], external: list[int]) -> None:
        """Add the operators from [..., tokens, inputs] to [tokens, inputs, 1, 1], the convolution, and back."""
        name, (source,) = op["name"], op["inputIndexes"]
        inputs, outputs = attributes[INPUTS], attributes[OUTPUTS]
        if source not in self.inputs:
            flat = self.reshape(f"{name}__flat", [-1, inputs, 1, 1], source)
            self.inputs[source] = self.convert_layout(f"{name}__packed", "NCHW", NC4HW4, flat)
        common = {"padX": 0, "padY": 0, "kernelX": 1, "kernelY": 1, "strideX": 1, "strideY": 1, "dilateX": 1}
        common |= {"dilateY": 1, "padMode": "CAFFE", "group": 1, "outputCount": outputs, "inputCount": inputs}
        common |= {"relu": False, "relu6": False, "hasOutputShape": False}
        main = {"common": common, "external": external}
        convolved = self.add("Convolution", main, f"{name}{LINEAR}", [self.inputs[source]])
        plain = self.convert_layout(f"{name}__unpacked", NC4HW4, "NCHW", convolved)
        self.reshape(name, [1] * (attributes[RANK] - 2) + [-1, outputs], plain, op["outputIndexes"])


def restore_linear_layers(graph: Graph, weights: Path, biases: dict[str, np.ndarray]) -> None:
    """Replace the opaque operators of a graph by MNN's own, and append their `biases` to its weight file.

    Biases are float32 [outputs] by the names of their initializers. Raise ConversionError if the converter changed an
    opaque operator.
    """
    builder = _LinearBuilder(graph)
    with weights.open("ab") as file:
        for op in graph.ops:
            if op["type"] != "Extra" or op["main"].get("type") != OPERATOR:
                builder.ops.append(op)
                continue
            attributes = {item["key"]: item.get("s", item["i"]) for item in op["main"]["attr"]}
            if not {INPUTS, OUTPUTS, RANK} <= set(attributes) or len(op["inputIndexes"]) != 1:
                raise ConversionError(
                    f"MNN's converter changed the linear layer {op['name']}; this is a bug, report it"
                )
            bias = biases[attributes[BIAS]] if attributes[BIAS] else np.zeros(attributes[OUTPUTS], np.float32)
            builder.convolution(op, attributes, [file.tell(), 0, bias.nbytes])
            file.write(bias.astype(np.float32).tobytes())
    graph.content["oplists"] = builder.ops
