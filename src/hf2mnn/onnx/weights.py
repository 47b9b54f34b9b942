"""Give a traced graph its weights: each initializer is read from the checkpoint only while it is being written."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hf2mnn.errors import ExportError, SourceError
from hf2mnn.source.checkpoint import Checkpoint


def _read(checkpoint: Checkpoint, parameter: str, shape: tuple[int, ...], transposed: bool, name: str) -> ir.Tensor:
    array = checkpoint.tensor(parameter).float().reshape(shape).numpy()
    return ir.Tensor(np.ascontiguousarray(array.T) if transposed else array, name=name)


def _lazy(checkpoint: Checkpoint, parameter: str, shape: tuple[int, ...], transposed: bool, name: str) -> ir.LazyTensor:
    stored = checkpoint.shape(parameter)
    if stored != shape:
        raise SourceError(
            f"{checkpoint.folder} holds {checkpoint.find(parameter)} as {list(stored)}, its config.json asks for"
            f" {list(shape)}: config and weights are not of one model"
        )
    return ir.LazyTensor(
        partial(_read, checkpoint, parameter, shape, transposed, name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape[::-1] if transposed else shape),
        name=name,
        cache=False,
    )


def attach_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Attach float32 values to every initializer without one. `Transpose(weight)` becomes a transposed initializer, so
    a linear layer is one MatMul.

    Raises:
        SourceError: a weight is missing or has another shape than the configuration says.
        ExportError: a graph input has no value and is no weight.
    """
    graph = model.graph
    for parameter, value in list(graph.initializers.items()):
        if value.const_value is not None:
            continue
        shape = tuple(int(side) for side in value.shape)
        for node in [use.node for use in value.uses()]:
            if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
                name = f"{parameter}.T"
                flipped = ir.Value(name=name, shape=ir.Shape(shape[::-1]), type=value.type)
                flipped.const_value = _lazy(checkpoint, parameter, shape, True, name)
                graph.register_initializer(flipped)
                node.outputs[0].replace_all_uses_with(flipped)
                graph.remove(node, safe=True)
        if value.uses():
            value.const_value = _lazy(checkpoint, parameter, shape, False, parameter)
        else:
            graph.initializers.pop(parameter)
    bare = [name for name, value in graph.initializers.items() if value.const_value is None]
    if bare:
        raise ExportError(f"the graph has weights without values: {', '.join(bare[:3])}; this is a bug, report it")


def save(model: ir.Model, path: Path) -> None:
    """Write `path` and, beside it, `path`.data with every tensor of 1 kB or more; one tensor in memory at a time.

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
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
