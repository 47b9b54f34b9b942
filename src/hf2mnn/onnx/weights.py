"""Give a traced graph its weights.

The matrices of linear layers and the embedding stay where they are: the graph points into the checkpoint's own
safetensors and casts what it reads there to float32, so nothing of them is read, and nothing is written. What else
there is (norms, biases, the patch embedding: a few MB), and what the checkpoint holds packed, is written as float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.errors import ExportError
from hf2mnn.core.files import link_or_copy

FLOAT, TRANSPOSED = ".float", ".T"
"""Names of the values that a weight goes through on its way to an operator: `x.weight.float`, `x.weight.float.T`."""
INLINE = 1024
"""Bytes up to which a tensor is in the graph itself."""


def _read(checkpoint: Checkpoint, parameter: str, shape: tuple[int, ...]) -> ir.Tensor:
    return ir.Tensor(checkpoint.tensor(parameter).float().reshape(shape).numpy(), name=parameter)


def _transposes(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _is_matrix(value: ir.Value) -> bool:
    """Whether a weight is read by linear layers and embeddings alone, before and after a transposition."""
    places = {"MatMul": 1, "Gemm": 1, "Gather": 0}
    readers = [use for user in value.uses() for use in _through(user)]
    return len(value.shape) == 2 and all(places.get(use.node.op_type) == use.idx for use in readers)


def _through(use: ir.Usage) -> list[ir.Usage]:
    return list(use.node.outputs[0].uses()) if _transposes(use.node) else [use]


def _point(stored: StoredTensor, name: str) -> ir.ExternalTensor:
    dtype = ir.DataType.from_numpy(stored.dtype)
    shape = ir.Shape(stored.shape)
    return ir.ExternalTensor(stored.path.name, stored.offset, stored.size, dtype, shape=shape, name=name)


def _cast(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Let the readers of a weight read its float32."""
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
    read = value
    if stored is not None and _is_matrix(value):
        value.const_value = _point(stored, parameter)
        value.type = ir.TensorType(value.const_value.dtype)
        if value.const_value.dtype != ir.DataType.FLOAT:
            read = _cast(graph, value)
    else:
        values = partial(_read, checkpoint, parameter, shape)
        value.const_value = ir.LazyTensor(values, ir.DataType.FLOAT, ir.Shape(shape), name=parameter, cache=False)
    for node in [use.node for use in read.uses() if _transposes(use.node)]:
        node.outputs[0].name = f"{read.name}{TRANSPOSED}"


def attach_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Attach values to every initializer without one.

    Raises:
        CheckpointError: a weight is missing or has another shape than the configuration says.
        ExportError: a graph input has no value and is no weight.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.const_value is None:
            _attach(graph, value, checkpoint)
    bare = [name for name, value in graph.initializers.items() if value.const_value is None]
    if bare:
        raise ExportError(f"the graph has weights without values: {', '.join(bare[:3])}; this is a bug, report it")


def link_shards(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """Put the files that a graph points into beside it: ONNX Runtime follows no path that leads out of the graph's
    folder, and no symbolic link.
    """
    pointed = {
        value.const_value.location
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    for name in sorted(map(str, pointed)):
        if not (folder / name).exists():
            link_or_copy((checkpoint.folder / name).resolve(), folder / name)


def save(model: ir.Model, path: Path) -> None:
    """Write `path` and, beside it, `path`.data with every tensor of its own over 1 kB; one tensor in memory at a time.

    The exporter's notes (stack traces with this machine's paths, torch's own names) are left out: the same model
    gives the same bytes anywhere.
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
        if not isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes > INLINE
    ]
    tensors = [value.const_value for value in own]
    written = convert_tensors_to_external(tensors, path.parent, f"{path.name}.data") if own else []
    for value, tensor in zip(own, written, strict=True):
        value.const_value = tensor
    ir.save(model, path)
