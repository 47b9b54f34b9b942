"""Deepstack: after each of the first layers, the decoder adds what a block of the vision tower has seen of an image.

deepstack_embeds float32 [layers, tokens, hidden] has zeros where there is text; one token serves for all, as the engine
feeds zeros [layers, 1, 1]. It is put into the finished graph, so that the layers themselves are alike when they are
traced.
"""

from __future__ import annotations

import onnx_ir as ir

from hf2mnn.core.errors import ExportError

DEEPSTACK = "deepstack_embeds"


def add_deepstack(model: ir.Model, layers: str, count: int, hidden: int) -> None:
    """Let a decoder's graph, its points named, add `deepstack_embeds` to what its first `count` layers give. `layers`
    is the name of their list.

    Raises:
        ExportError: the graph has no point for what a layer gives.
    """
    graph = model.graph
    given = ir.Value(name=DEEPSTACK, shape=ir.Shape([count, "seen", hidden]), type=ir.TensorType(ir.DataType.FLOAT))
    made = {value.name: value for node in graph for value in node.outputs}
    # Not Gather: MNN's converter dies of one in the dump of its own graph.
    split = ir.node("Split", [given], {"axis": 0, "num_outputs": count}, num_outputs=count, name="deepstack")
    for layer, seen in enumerate(split.outputs):
        output = made.get(f"{layers}.{layer}")
        if output is None:
            raise ExportError(f"the decoder has no point for what layer {layer} gives; this is a bug, report it")
        added = ir.node("Add", [output, seen], name=f"deepstack_{layer}/added")
        seen.name, seen.type = f"deepstack_{layer}/seen", given.type
        result = added.outputs[0]
        result.name, result.type, result.shape = added.name, given.type, output.shape
        output.replace_all_uses_with(result)
        added.replace_input_with(0, output)
        graph.insert_after(output.producer(), added)
    graph.insert_before(graph[0], split)
    graph.inputs.append(given)
