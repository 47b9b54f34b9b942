"""Name tap points in an ONNX graph (`hf2mnn.reference.golden`), and add graph outputs and inputs at them.

The value `model.language_model.layers.0.self_attn.q_proj` is the output of that module's forward, as in PyTorch.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:  # importing it takes half a second, and most importers of this module do not need it
    import onnx_ir as ir

WEIGHT = re.compile(r"(?P<module>.+)\.weight(?:\.float)?(?:\.T)?")
ATTENTION = re.compile(r"attention_\d+/")
BLOCK = re.compile(r"(?P<block>.+\.\d+)\.")
MODULE_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
PARAMETER_SUFFIXES = (".weight", ".bias", ".float", ".T", ".inv_freq")


def _single_use(value: ir.Value, op: str) -> ir.Node | None:
    """Return the only node that uses a value if it is an `op`."""
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op else None


def _module_output(node: ir.Node, module: str) -> ir.Value:
    """Return the output of the module whose weight a node uses: after its bias, which may be a node of its own."""
    add = _single_use(node.outputs[0], "Add")
    has_bias = add and any(value.name == f"{module}.bias" for value in add.inputs)
    return (add if has_bias else node).outputs[0]


def _name_attention(linear: ir.Node, module: str) -> None:
    """Name context, query and key of the attention whose output projection is `linear`, if it is one."""
    reshape = linear.inputs[0].producer()
    context = reshape.inputs[0].producer() if reshape and reshape.op_type == "Reshape" else None
    prefix = ATTENTION.match(context.name or "") if context else None
    if not prefix:
        return
    attention = module.rpartition(".")[0]
    reshape.outputs[0].name = f"{attention}.context"
    for node in linear.graph:
        if node.name in (f"{prefix[0]}query", f"{prefix[0]}key"):
            node.outputs[0].name = f"{attention}.{node.name.rpartition('/')[2]}"


def name_tap_points(model: ir.Model) -> None:
    """Rename the values of a graph that are tap points; graph outputs keep their names."""
    graph = model.graph
    fixed = {value.name for value in graph.outputs}
    block_ends: dict[str, ir.Value] = {}
    for node in list(graph):
        for value in node.inputs:
            weight = WEIGHT.fullmatch(value.name or "") if value is not None else None
            if weight is None or node.op_type in ("Cast", "Transpose", "Gather"):
                continue
            module = weight["module"]
            output = _module_output(node, module)
            if node.op_type in ("MatMul", "Gemm"):
                _name_attention(node, module)
                if block := BLOCK.match(module):
                    block_ends[block["block"]] = output
            if output.name not in fixed:
                output.name = module
    for block, output in block_ends.items():
        # A block ends with the residual addition after its last linear layer.
        if (add := _single_use(output, "Add")) is not None and add.outputs[0].name not in fixed:
            add.outputs[0].name = block


def select_tap_points(names: list[str]) -> list[str]:
    """Return the names that are tap points: dotted module paths."""
    return [name for name in names if MODULE_PATH.fullmatch(name or "") and not name.endswith(PARAMETER_SUFFIXES)]


def outputs_by_module(model: onnx.ModelProto) -> dict[str, str]:
    """Return the graph outputs that are tap points under another name ("logits"), by the module that computes them."""
    outputs, by_module = {value.name for value in model.graph.output}, {}
    for node in model.graph.node:
        for name in node.input:
            if outputs.intersection(node.output) and (weight := WEIGHT.fullmatch(name)):
                by_module[weight["module"]] = node.output[0]
    return by_module


def add_outputs(model: onnx.ModelProto, names: list[str]) -> None:
    """Add intermediate tensors to the outputs of the graph."""
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in present)


def replace_with_inputs(model: onnx.ModelProto, tap_points: list[str]) -> dict[str, str]:
    """Replace all uses of tap points by new graph inputs for values of another runtime; return their names."""
    used = {name for node in model.graph.node for name in node.input}
    inputs = {name: f"{name}/fed" for name in tap_points if name in used}
    for node in model.graph.node:
        node.input[:] = [inputs.get(name, name) for name in node.input]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inputs.values()
    )
    return inputs
