"""Adapt the inputs and outputs of the ONNX graphs to MNN's LLM engine: its names and shapes of tensors.

Weights are not copied: the adapted graph reads the files of the original one by symbolic links.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from hf2mnn.onnx.initializers import stored_initializers

FLAT = "_flat"  # suffix of an output before it gets the shape that the engine requires


def save_adapted(model: onnx.ModelProto, source: Path, folder: Path) -> Path:
    """Write an adapted graph of the ONNX file `source` to `folder`, with links to the weight files that it uses.

    Raise ExportError if one is missing or too short; the converter would use zeros without a message.
    """
    stored = stored_initializers(source)
    used = {tensor.name for tensor in model.graph.initializer if uses_external_data(tensor)}
    for path in {stored[name].path for name in used}:
        (folder / path.name).symlink_to(path.resolve())
    adapted = folder / source.name
    onnx.save(model, adapted)
    return adapted


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
