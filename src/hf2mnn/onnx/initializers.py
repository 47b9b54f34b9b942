"""Read the weights of an exported graph from its external files, without loading all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from hf2mnn.checkpoint.tensors import StoredTensor
from hf2mnn.core.errors import ExportError
from hf2mnn.core.untrusted import path_inside


def load_graph(path: Path) -> onnx.ModelProto:
    """Load an ONNX file without its external data, or raise ExportError."""
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ExportError(f"{path} is not an ONNX graph that can be read ({error}); export it again") from None


def _stored(tensor: onnx.TensorProto, folder: Path) -> StoredTensor:
    """Return the location of an external tensor, which must be in `folder`."""
    try:
        info, dtype = ExternalDataInfo(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset, shape = path_inside(folder, info.location), int(info.offset or 0), tuple(tensor.dims)
        if min(offset, *shape) < 0:
            raise ValueError(f"{shape} at {offset}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"initializer {tensor.name} has an invalid external location ({error}); export the graph again"
        ) from None
    return StoredTensor(path, dtype, shape, offset)


def stored_initializers(graph: Path) -> dict[str, StoredTensor]:
    """Return the locations of an ONNX file's external initializers by name; raise ExportError if one does not exist."""
    initializers = {}
    for tensor in filter(uses_external_data, load_graph(graph).graph.initializer):
        stored = initializers[tensor.name] = _stored(tensor, graph.parent)
        end = stored.offset + stored.size
        size = stored.path.stat().st_size if stored.path.is_file() else 0
        if size < end:
            raise ExportError(
                f"initializer {tensor.name} of {graph.name} ends at byte {end} of {stored.path.name}, which has {size}"
                " bytes; export the graph again"
            )
    return initializers


class Matrices:
    """Constant matrices of a graph in `folder`: initializers, directly or through Cast and Transpose."""

    def __init__(self, model: onnx.ModelProto, folder: Path = Path()) -> None:
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.folder = folder

    def _find(self, name: str) -> tuple[onnx.TensorProto | None, bool]:
        """Return the initializer behind a value, and whether it is transposed."""
        transposed = False
        while (node := self.producers.get(name)) is not None and node.op_type in ("Cast", "Transpose"):
            transposed ^= node.op_type == "Transpose"
            name = node.input[0]
        return self.initializers.get(name), transposed

    def shape(self, name: str) -> tuple[int, int] | None:
        """Return the shape of a value, or None if it is not a constant matrix."""
        tensor, transposed = self._find(name)
        if tensor is None or len(tensor.dims) != 2:
            return None
        return tuple(tensor.dims[::-1] if transposed else tensor.dims)

    def read(self, name: str) -> np.ndarray:
        """Read a constant matrix in float32."""
        tensor, transposed = self._find(name)
        if uses_external_data(tensor):
            values = _stored(tensor, self.folder).rows(0, tensor.dims[0])
        else:
            values = numpy_helper.to_array(tensor).astype(np.float32)
        return values.T if transposed else values


def float_values(graph: Path) -> dict[str, np.ndarray]:
    """Return the float32 constants and initializers inside an ONNX file, by name."""
    model = load_graph(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if not uses_external_data(tensor)}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    floats = {name: tensor for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    try:
        return {name: numpy_helper.to_array(tensor) for name, tensor in floats.items()}
    except (ValueError, TypeError) as error:
        raise ExportError(f"{graph} has an invalid constant ({error}); export it again") from None


def small_constants(graph: Path) -> dict[str, np.ndarray]:
    """Return the float32 values that MNN's converter stores inside a graph: `float_values`, and external vectors."""
    external = {name: stored for name, stored in stored_initializers(graph).items() if len(stored.shape) == 1}
    return float_values(graph) | {name: stored.rows(0, stored.shape[0]) for name, stored in external.items()}
