"""Name the values of a graph that are points (`hf2mnn.reference.tap_points`), and let them be read and fed.

`model.language_model.layers.0.self_attn.q_proj` is then what that module's forward returns, in ONNX as in PyTorch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:  # it takes half a second to load, and quantizing and the doctor read names alone
    import onnx_ir as ir

WEIGHT = re.compile(r"(?P<module>.+)\.weight(?:\.float)?(?:\.T)?")
ATTENTION = re.compile(r"attention_\d+/")
BLOCK = re.compile(r"(?P<block>.+\.\d+)\.")


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op else None


def _module_output(node: ir.Node, module: str) -> ir.Value:
    """What a module returns, from the node that reads its weight: after the bias, where that is a node of its own."""
    output = node.outputs[0]
    added = _only_user(output, "Add")
    if added is not None and any(value is not None and value.name == f"{module}.bias" for value in added.inputs):
        return added.outputs[0]
    return output


def _name_attention(linear: ir.Node, module: str) -> None:
    """Where a linear layer reads an attention's context, name that and its query and key after the attention."""
    reshape = linear.inputs[0].producer() if linear.inputs[0] is not None else None
    context = reshape.inputs[0].producer() if reshape is not None and reshape.op_type == "Reshape" else None
    found = ATTENTION.match(context.name or "") if context is not None else None
    if found is None:
        return
    attention = module.rpartition(".")[0]
    reshape.outputs[0].name = f"{attention}.context"
    for node in linear.graph:
        if node.name in (f"{found[0]}query", f"{found[0]}key"):
            node.outputs[0].name = f"{attention}.{node.name.rpartition('/')[2]}"


def name_points(model: ir.Model) -> list[str]:
    """Rename the values of a graph that are points; gives their names in the order in which they are computed."""
    graph = model.graph
    fixed = {value.name for value in graph.outputs}
    last_of_block: dict[str, ir.Value] = {}
    for node in list(graph):
        for value in node.inputs:
            found = WEIGHT.fullmatch(value.name or "") if value is not None else None
            if found is None or node.op_type in ("Cast", "Transpose", "Gather"):
                continue
            module = found["module"]
            output = _module_output(node, module)
            if node.op_type in ("MatMul", "Gemm"):
                _name_attention(node, module)
                if block := BLOCK.match(module):
                    last_of_block[block["block"]] = output
            if output.name not in fixed:
                output.name = module
    for block, output in last_of_block.items():
        # A block ends in the sum of its last linear layer and what went past it.
        if (added := _only_user(output, "Add")) is not None and added.outputs[0].name not in fixed:
            added.outputs[0].name = block
    return points_of([output.name for node in graph for output in node.outputs])


def points_of(names: list[str]) -> list[str]:
    """Those names of values that are points: dotted module paths."""
    return [name for name in names if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name or "") and not _is_parameter(name)]


def _is_parameter(name: str) -> bool:
    return name.endswith((".weight", ".bias", ".float", ".T", ".inv_freq"))


def outputs_by_module(model: onnx.ModelProto) -> dict[str, str]:
    """Points that are outputs of the graph under a name of their own ("logits"), by the module that computes them."""
    outputs, found = {value.name for value in model.graph.output}, {}
    for node in model.graph.node:
        for name in node.input:
            if outputs.intersection(node.output) and (weight := WEIGHT.fullmatch(name)):
                found[weight["module"]] = node.output[0]
    return found


def expose(model: onnx.ModelProto, points: list[str]) -> None:
    """Make `points` outputs of the graph."""
    have = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in points if name not in have)


def cut(model: onnx.ModelProto, points: list[str]) -> dict[str, str]:
    """Let every reader of a point read a new graph input in its place, so that what is computed from one point to the
    next can be judged alone, fed with another runtime's values. Gives the input's name by point.
    """
    read = {name for node in model.graph.node for name in node.input}
    inputs = {name: f"{name}/fed" for name in points if name in read}
    for node in model.graph.node:
        node.input[:] = [inputs.get(name, name) for name in node.input]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inputs.values()
    )
    return inputs
