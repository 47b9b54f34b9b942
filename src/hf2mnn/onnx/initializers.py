"""Read the weights of an exported graph where they lie, without loading the graph's data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.errors import ExportError
from hf2mnn.core.untrusted import inside


def load_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file without the data that lies outside of it.

    Raises:
        ExportError: it is none.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ExportError(f"{path} is not an ONNX graph that can be read ({error}); make it again") from None


def _stored(tensor: onnx.TensorProto, folder: Path) -> StoredTensor:
    """Raises ExportError for a place that is out of the folder, or none."""
    try:
        info, dtype = ExternalDataInfo(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset, shape = inside(folder, info.location), int(info.offset or 0), tuple(tensor.dims)
        if min(offset, *shape) < 0:
            raise ValueError(f"{shape} at {offset}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{tensor.name} is said to lie where nothing can be read ({error}); export the graph again"
        ) from None
    return StoredTensor(path, dtype, shape, offset)


def stored_initializers(graph: Path) -> dict[str, StoredTensor]:
    """Every initializer of an ONNX file that lies outside of it, by name.

    Raises:
        ExportError: a file that the graph points into is missing or too short.
    """
    model, found = load_graph(graph), {}
    for tensor in filter(uses_external_data, model.graph.initializer):
        stored = found[tensor.name] = _stored(tensor, graph.parent)
        size = stored.path.stat().st_size if stored.path.is_file() else 0
        if size < stored.offset + stored.size:
            raise ExportError(
                f"{graph.name} reads {tensor.name} up to byte {stored.offset + stored.size} of {stored.path.name},"
                f" which has {size}; export it again"
            )
    return found


class Matrices:
    """The matrices that a graph's operators read: initializers, cast and transposed on their way or not."""

    def __init__(self, model: onnx.ModelProto, folder: Path = Path()) -> None:
        """`folder` is the graph's, for `read`."""
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.folder = folder

    def _find(self, name: str) -> tuple[onnx.TensorProto | None, bool]:
        transposed = False
        while (node := self.producers.get(name)) is not None and node.op_type in ("Cast", "Transpose"):
            transposed ^= node.op_type == "Transpose"
            name = node.input[0]
        return self.initializers.get(name), transposed

    def shape(self, name: str) -> tuple[int, int] | None:
        """Of the value `name`; None for what is no matrix of constants."""
        tensor, transposed = self._find(name)
        if tensor is None or len(tensor.dims) != 2:
            return None
        return tuple(tensor.dims[::-1] if transposed else tensor.dims)

    def read(self, name: str) -> np.ndarray:
        """float32, of the value `name`, which has a `shape`."""
        tensor, transposed = self._find(name)
        if uses_external_data(tensor):
            values = _stored(tensor, self.folder).rows(0, tensor.dims[0])
        else:
            values = numpy_helper.to_array(tensor).astype(np.float32)
        return values.T if transposed else values


def float_values(graph: Path) -> dict[str, np.ndarray]:
    """float32 constants and initializers that an ONNX file holds itself, by name.

    Raises:
        ExportError: one of them is not the values of its shape.
    """
    model = load_graph(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if not uses_external_data(tensor)}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    floats = {name: tensor for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    try:
        return {name: numpy_helper.to_array(tensor) for name, tensor in floats.items()}
    except (ValueError, TypeError) as error:
        raise ExportError(f"{graph} has a constant that is none ({error}); make it again") from None


def initializer_values(graph: Path, axes: int) -> dict[str, np.ndarray]:
    """float32 initializers with so many axes, by name, wherever they lie."""
    outside = {name: stored for name, stored in stored_initializers(graph).items() if len(stored.shape) == axes}
    inside = {name: values for name, values in float_values(graph).items() if values.ndim == axes}
    return inside | {name: stored.rows(0, stored.shape[0]) for name, stored in outside.items()}


def small_values(graph: Path) -> dict[str, np.ndarray]:
    """What an MNN graph of an ONNX file may hold itself: its float32 constants, and vectors wherever they lie, by
    name.
    """
    return float_values(graph) | initializer_values(graph, 1)
