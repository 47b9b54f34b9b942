"""Attach the checkpoint's weights to a traced graph.

Matrices of linear layers and the embedding stay in the checkpoint's safetensors files, and the graph casts their bytes
to float32. Other tensors (norms, biases, the patch embedding: a few MB) and dequantized weights are written as float32.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external

from hf2mnn.checkpoint.folder import Checkpoint
from hf2mnn.core.files import link_or_copy

FLOAT, TRANSPOSED = ".float", ".T"  # suffixes of a weight after its cast and its transposition: x.weight.float.T
MAX_INLINE_BYTES = 1024  # bytes of the largest tensor that is stored in the graph itself


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _is_matrix(value: ir.Value) -> bool:
    """Return whether only linear layers and embeddings use a weight, directly or through a transposition."""
    weight_inputs = {"MatMul": 1, "Gemm": 1, "Gather": 0}
    uses = [use.node.outputs[0].uses() if _is_transpose(use.node) else [use] for use in value.uses()]
    return len(value.shape) == 2 and all(weight_inputs.get(use.node.op_type) == use.idx for use in chain(*uses))


def _attach(graph: ir.Graph, value: ir.Value, checkpoint: Checkpoint) -> None:
    parameter, shape = value.name, tuple(int(side) for side in value.shape)
    stored = checkpoint.stored(parameter)
    float_value = value
    if stored is not None and _is_matrix(value):
        dtype, file = ir.DataType.from_numpy(stored.dtype), stored.path.name
        value.const_value = ir.ExternalTensor(
            file, stored.offset, stored.size, dtype, shape=ir.Shape(stored.shape), name=parameter
        )
        value.type = ir.TensorType(dtype)
        if dtype != ir.DataType.FLOAT:
            float_value = ir.val(f"{parameter}{FLOAT}", ir.DataType.FLOAT, value.shape)
            value.replace_all_uses_with(float_value)
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[float_value], name=float_value.name)
            graph.insert_before(graph[0], cast)
    else:

        def read() -> ir.Tensor:
            return ir.Tensor(checkpoint.tensor(parameter).float().reshape(shape).numpy(), name=parameter)

        value.const_value = ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(shape), name=parameter, cache=False)
    for node in [use.node for use in float_value.uses() if _is_transpose(use.node)]:
        node.outputs[0].name = f"{float_value.name}{TRANSPOSED}"


def attach_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Attach a value to every initializer that has none; raise CheckpointError if its weight is missing or differs."""
    for value in list(model.graph.initializers.values()):
        if value.const_value is None:
            _attach(model.graph, value, checkpoint)


def link_shards(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """Link the files that a graph refers to into its folder.

    ONNX Runtime follows neither symbolic links nor paths out of the folder, so these are hard links or copies.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    for name in sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}):
        if not (folder / name).exists():
            link_or_copy((checkpoint.folder / name).resolve(), folder / name)


def save(model: ir.Model, path: Path) -> None:
    """Write `path`, and its own tensors over `MAX_INLINE_BYTES` to `path`.data, with one tensor in memory at a time.

    Metadata of the exporter (stack traces with local paths) is removed, so that bytes are the same on any machine.
    """
    initializers = model.graph.initializers.values()
    outputs = (value for node in model.graph for value in node.outputs)
    for item in [model, model.graph, *model.graph, *outputs, *model.graph.inputs, *initializers]:
        item.metadata_props.clear()
    own = [value for value in initializers if not isinstance(value.const_value, ir.ExternalTensor)]
    if large := [value for value in own if value.const_value.nbytes > MAX_INLINE_BYTES]:
        tensors = [value.const_value for value in large]
        external = convert_tensors_to_external(tensors, path.parent, f"{path.name}.data")
        for value, tensor in zip(large, external, strict=True):
            value.const_value = tensor
    ir.save(model, path)
