"""Attach the checkpoint's weights to a traced graph.

Matrices of linear layers and the embedding stay in the checkpoint's safetensors files: the graph refers to their bytes
and casts them to float32, so nothing is read or written. All other tensors (norms, biases, the patch embedding: a few
MB) and dequantized weights of prequantized checkpoints are written as float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.files import link_or_copy

FLOAT, TRANSPOSED = ".float", ".T"
"""Suffixes of a weight's value after its cast and its transposition: `x.weight.float`, `x.weight.float.T`."""
MAX_INLINE_BYTES = 1024
"""Bytes of the largest tensor that is stored in the graph itself."""


def _read(checkpoint: Checkpoint, parameter: str, shape: tuple[int, ...]) -> ir.Tensor:
    return ir.Tensor(checkpoint.tensor(parameter).float().reshape(shape).numpy(), name=parameter)


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _is_matrix(value: ir.Value) -> bool:
    """Return whether only linear layers and embeddings use a weight, directly or through a transposition."""
    weight_inputs = {"MatMul": 1, "Gemm": 1, "Gather": 0}
    uses = [use for user in value.uses() for use in _skip_transpose(user)]
    return len(value.shape) == 2 and all(weight_inputs.get(use.node.op_type) == use.idx for use in uses)


def _skip_transpose(use: ir.Usage) -> list[ir.Usage]:
    return list(use.node.outputs[0].uses()) if _is_transpose(use.node) else [use]


def _external_tensor(stored: StoredTensor, name: str) -> ir.ExternalTensor:
    dtype = ir.DataType.from_numpy(stored.dtype)
    shape = ir.Shape(stored.shape)
    return ir.ExternalTensor(stored.path.name, stored.offset, stored.size, dtype, shape=shape, name=name)


def _insert_cast(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Cast a weight to float32 for all its uses."""
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}{FLOAT}")
    cast = node.outputs[0]
    cast.name, cast.shape, cast.type = node.name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    value.replace_all_uses_with(cast)
    node.replace_input_with(0, value)
    graph.insert_before(graph[0], node)
    return cast


def _attach(graph: ir.Graph, value: ir.Value, checkpoint: Checkpoint) -> None:
    parameter, shape = value.name, tuple(int(side) for side in value.shape)
    checkpoint.check_shape(parameter, shape)
    stored = checkpoint.stored(parameter)
    float_value = value
    if stored is not None and _is_matrix(value):
        value.const_value = _external_tensor(stored, parameter)
        value.type = ir.TensorType(value.const_value.dtype)
        if value.const_value.dtype != ir.DataType.FLOAT:
            float_value = _insert_cast(graph, value)
    else:
        values = partial(_read, checkpoint, parameter, shape)
        value.const_value = ir.LazyTensor(values, ir.DataType.FLOAT, ir.Shape(shape), name=parameter, cache=False)
    for node in [use.node for use in float_value.uses() if _is_transpose(use.node)]:
        node.outputs[0].name = f"{float_value.name}{TRANSPOSED}"


def attach_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Attach a value to every initializer that has none.

    Raises:
        CheckpointError: A weight is missing or its shape differs from the configuration.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.const_value is None:
            _attach(graph, value, checkpoint)


def link_shards(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """Link the files that a graph refers to into its folder.

    ONNX Runtime follows neither symbolic links nor paths out of the folder, so these are hard links or copies.
    """
    names = {
        value.const_value.location
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for name in sorted(map(str, names)):
        if not (folder / name).exists():
            link_or_copy((checkpoint.folder / name).resolve(), folder / name)


def save(model: ir.Model, path: Path) -> None:
    """Write `path`, and its own tensors over `MAX_INLINE_BYTES` to `path`.data, with one tensor in memory at a time.

    Metadata of the exporter (stack traces with local paths, names of torch) is removed, so that a model gives the same
    bytes on any machine.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    own = [
        value
        for value in model.graph.initializers.values()
        if not isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes > MAX_INLINE_BYTES
    ]
    tensors = [value.const_value for value in own]
    external = convert_tensors_to_external(tensors, path.parent, f"{path.name}.data") if own else []
    for value, tensor in zip(own, external, strict=True):
        value.const_value = tensor
    ir.save(model, path)
