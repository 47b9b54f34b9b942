"""Put the portable graphs into the form that MNN's LLM engine looks for: its tensor names and its layout.

Only names and two reshaping nodes change; weights stay in the ONNX graph's own files, linked, not copied.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from hf2mnn.onnx.initializers import stored_initializers

FLAT = "_flat"
"""What an output is called before it gets the shape that the engine wants."""


def save_dressed(model: onnx.ModelProto, source: Path, folder: Path) -> Path:
    """Write a changed graph of `source` into `folder`, and link beside it the files that it reads.

    Raises:
        ExportError: a weight is not where the graph says. The converter takes a file that is missing or too short for
            zeros and says nothing.
    """
    stored = stored_initializers(source)
    read = {tensor.name for tensor in model.graph.initializer if uses_external_data(tensor)}
    for path in {stored[name].path for name in read}:
        (folder / path.name).symlink_to(path.resolve())
    dressed = folder / source.name
    onnx.save(model, dressed)
    return dressed


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def dress_decoder(model: onnx.ModelProto) -> None:
    """`inputs_embeds` [1, tokens, hidden] becomes `input_ids` [tokens, 1, hidden], as `llm.cpp` feeds it.

    `presents` is no output any more: the engine keeps the cache itself, and once every attention is fused nothing
    else reads `past_key_values`, so that input goes too. Where it stays, an attention was not fused.
    """
    embeds = next(value for value in model.graph.input if value.name == "inputs_embeds")
    model.graph.value_info.append(embeds)
    dims = embeds.type.tensor_type.shape.dim
    shape = [dims[1].dim_param, 1, dims[2].dim_value]
    embeds.CopyFrom(helper.make_tensor_value_info("input_ids", onnx.TensorProto.FLOAT, shape))
    del model.graph.output[[value.name for value in model.graph.output].index("presents")]
    model.graph.node.insert(0, helper.make_node("Transpose", ["input_ids"], ["inputs_embeds"], perm=[1, 0, 2]))


def dress_vision(model: onnx.ModelProto) -> None:
    """`image_embeds` [image tokens, hidden] becomes [image tokens, 1, hidden], as `omni.cpp` joins it with text; what
    deepstack adds keeps its form.
    """
    output = model.graph.output[0]
    dims = output.type.tensor_type.shape.dim
    shape = [dims[0].dim_param, 1, dims[1].dim_value]
    _rename(model, "image_embeds", f"image_embeds{FLAT}")
    output.CopyFrom(helper.make_tensor_value_info("image_embeds", onnx.TensorProto.FLOAT, shape))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "image_embeds_axis"))
    model.graph.node.append(
        helper.make_node("Unsqueeze", [f"image_embeds{FLAT}", "image_embeds_axis"], ["image_embeds"])
    )
