"""Put the portable graphs into the form that MNN's LLM engine looks for: its tensor names and its layout.

Only names and two reshaping nodes change; the weights stay in the ONNX graph's own data file, linked, not copied.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from hf2mnn.errors import ConversionError

FLAT = "_flat"
"""What an output is called before it gets the shape that the engine wants."""


def _link_data(model: onnx.ModelProto, source: Path, destination: Path) -> None:
    """The graph names its data file relative to itself. The converter takes a file that is missing or too short for
    zeros and says nothing, so that is looked at here.

    Raises:
        ConversionError: a weight is not in the data file.
    """
    data = source.with_name(f"{source.name}.data")
    size = data.stat().st_size if data.is_file() else 0
    stored = [ExternalDataInfo(tensor) for tensor in model.graph.initializer if uses_external_data(tensor)]
    needed = max((int(info.offset or 0) + int(info.length or 0) for info in stored), default=0)
    if size < needed:
        raise ConversionError(
            f"{source.name} reads {needed} bytes of weights from {data.name}, which has {size}; export it again"
        )
    destination.with_name(data.name).symlink_to(data.resolve())


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


def dress_decoder(source: Path, destination: Path) -> None:
    """`inputs_embeds` [1, tokens, hidden] becomes `input_ids` [tokens, 1, hidden], as `llm.cpp` feeds it.

    `presents` is no output any more: the engine keeps the cache itself, and once every attention is fused nothing
    else reads `past_key_values`, so that input goes too. Where it stays, an attention was not fused.
    """
    model = onnx.load(source, load_external_data=False)
    embeds = next(value for value in model.graph.input if value.name == "inputs_embeds")
    dims = embeds.type.tensor_type.shape.dim
    shape = [dims[1].dim_param, 1, dims[2].dim_value]
    embeds.CopyFrom(helper.make_tensor_value_info("input_ids", onnx.TensorProto.FLOAT, shape))
    del model.graph.output[[value.name for value in model.graph.output].index("presents")]
    model.graph.node.insert(0, helper.make_node("Transpose", ["input_ids"], ["inputs_embeds"], perm=[1, 0, 2]))
    _link_data(model, source, destination)
    onnx.save(model, destination)


def dress_vision(source: Path, destination: Path) -> None:
    """`image_embeds` [image tokens, hidden] becomes [image tokens, 1, hidden], as `omni.cpp` joins it with text."""
    model = onnx.load(source, load_external_data=False)
    output = model.graph.output[0]
    dims = output.type.tensor_type.shape.dim
    shape = [dims[0].dim_param, 1, dims[1].dim_value]
    _rename(model, "image_embeds", f"image_embeds{FLAT}")
    output.CopyFrom(helper.make_tensor_value_info("image_embeds", onnx.TensorProto.FLOAT, shape))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "image_embeds_axis"))
    model.graph.node.append(
        helper.make_node("Unsqueeze", [f"image_embeds{FLAT}", "image_embeds_axis"], ["image_embeds"])
    )
    _link_data(model, source, destination)
    onnx.save(model, destination)
