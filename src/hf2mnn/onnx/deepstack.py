"""Deepstack: features of the vision tower that the decoder adds after each of its first layers (Qwen3-VL).

The input deepstack_embeds float32 [layers, tokens, hidden] is zero for text; MNN's engine feeds zeros [layers, 1, 1].
It is inserted into the finished graph, so that all layers are identical when they are traced.
"""

from __future__ import annotations

import onnx_ir as ir

from hf2mnn.core.errors import ExportError

DEEPSTACK = "deepstack_embeds"


def add_deepstack(model: ir.Model, layers: str, count: int, hidden: int) -> None:
    """Add `deepstack_embeds` to the outputs of the first `count` of the `layers` of a decoder graph with tap points."""
    graph = model.graph
    embeds = ir.val(DEEPSTACK, ir.DataType.FLOAT, [count, "seen", hidden])
    values = {value.name: value for node in graph for value in node.outputs}
    # Not Gather: MNN's converter crashes when it dumps such a graph.
    split = ir.node("Split", [embeds], {"axis": 0, "num_outputs": count}, num_outputs=count, name="deepstack")
    for layer, features in enumerate(split.outputs):
        output = values.get(f"{layers}.{layer}")
        if output is None:
            raise ExportError(f"the decoder graph has no tap point {layers}.{layer}; this is a bug, report it")
        features.name, features.type = f"deepstack_{layer}/seen", embeds.type
        result = ir.val(f"deepstack_{layer}/added", type=embeds.type, shape=output.shape)
        add = ir.node("Add", [output, features], outputs=[result], name=result.name)
        output.replace_all_uses_with(result)
        add.replace_input_with(0, output)
        graph.insert_after(output.producer(), add)
    graph.insert_before(graph[0], split)
    graph.inputs.append(embeds)
