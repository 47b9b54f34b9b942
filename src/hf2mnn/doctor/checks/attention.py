"""Checks whether the engine keeps a KV cache for every layer of a decoder.

The engine owns the cache. The converter inserts it with `--transformerFuse`, for every attention that matches the
operator chain of `hf2mnn.onnx.attention`, and prints success whatever it has matched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import onnx

from hf2mnn.doctor.artifacts import MnnModel, OnnxFile
from hf2mnn.doctor.findings import Finding
from hf2mnn.mnn.graph import Graph

PAST = "past_key_values"
CONVERT = "run 'hf2mnn convert' on the output of 'hf2mnn export': it passes --transformerFuse and counts the fusions"


def _counts(graph: Graph) -> tuple[int, int]:
    """Count the layers with a cache, linear attention included, and attentions without: operator chains or fused."""
    fused, softmaxes = len(graph.fused), len(graph.of_type("Softmax"))
    return fused + len(graph.of_type("LinearAttention")), softmaxes + len(graph.of_type("Attention")) - fused


def _counted(graph: Graph) -> str:
    cached, uncached = _counts(graph)
    return f"{cached} attentions with a KV cache, {uncached} without"


def _outputs_past(graph: Graph) -> bool:
    """Return whether an output is a copy of the past, which the converter's `RemovePastKeyValue` leaves."""
    past = {index for op in graph.of_type("Input") if op["name"] == PAST for index in op["outputIndexes"]}
    names = graph.content["tensorName"]
    return any(
        past.intersection(op["inputIndexes"]) and names[op["outputIndexes"][0]] in graph.outputs
        for op in graph.of_type("Reshape")
    )


def _state(model: MnnModel) -> str:
    """Return "fused", "no_flag" (converted without --transformerFuse), "partial" or "cut"; "" if it is no decoder."""
    graph = model.graph
    names = {*graph.inputs, *graph.outputs}
    if model.part != "decoder" and (model.part or not names & {PAST, "logits", "presents"}):
        return ""
    cached, uncached = _counts(graph)
    if not uncached:
        return "fused"
    if cached or (PAST in graph.inputs and _outputs_past(graph)):
        return "partial"
    return "no_flag" if PAST in graph.inputs else "cut"


def past_key_values_input(model: MnnModel) -> Iterator[Finding]:
    """Report a decoder converted without --transformerFuse: the past is an input, attentions are operator chains."""
    if _state(model) == "no_flag":
        message = f"the decoder has an input {PAST}: it was converted without --transformerFuse"
        evidence = f"input {PAST}, {_counted(model.graph)}"
        effect = f"the engine, which keeps the cache itself, stops with '{PAST} tensor is input but not found'"
        yield Finding(model.path.name, message, evidence, effect, CONVERT)


def attention_not_fused(model: MnnModel) -> Iterator[Finding]:
    """Report attentions that --transformerFuse did not match."""
    if _state(model) == "partial":
        copied = f", the output of the past is a copy of {PAST}" if _outputs_past(model.graph) else ""
        message = "the converter fused only some attentions, although it ran with --transformerFuse"
        effect = "if the engine loads it, layers without a cache attend only to the newest token during decoding"
        cure = f"{CONVERT}; 'hf2mnn doctor' on the .onnx file names the attentions that do not match"
        yield Finding(model.path.name, message, f"{_counted(model.graph)}{copied}", effect, cure)


def past_branch_cut(model: MnnModel) -> Iterator[Finding]:
    """Report a decoder whose past was removed from the graph, so that the engine does not ask for it."""
    if _state(model) == "cut":
        message = "the attentions have neither a past nor a KV cache: the past was removed from the graph"
        effect = "the engine loads it, and each new token is generated without the tokens before it"
        yield Finding(model.path.name, message, f"no input {PAST}, {_counted(model.graph)}", effect, CONVERT)


def fused_count(model: MnnModel) -> Iterator[Finding]:
    """Compare the number of cached attentions with `layer_nums`, or with the layers in the operator names."""
    layers, source = (model.layers, "layer_nums") if model.layers is not None else (model.layer_count, "operator names")
    cached, _ = _counts(model.graph)
    if _state(model) == "fused" and layers and cached != layers:
        message = "the number of attentions with a KV cache differs from the number of layers"
        evidence = f"{cached} attentions with a KV cache, {layers} layers ({source})"
        effect = "wrong output: a layer is missing or has no cache, or the files are of two models"
        yield Finding(model.path.name, message, evidence, effect, CONVERT)


def _is_onnx_decoder(model: OnnxFile) -> bool:
    names = {value.name for value in [*model.graph.input, *model.graph.output]}
    return model.part == "decoder" or (not model.part.startswith("vis") and bool(names & {"logits", PAST}))


def onnx_without_past(model: OnnxFile) -> Iterator[Finding]:
    """Report an ONNX decoder that was exported without a KV cache."""
    inputs = [value.name for value in model.graph.input]
    if _is_onnx_decoder(model) and not any(name.startswith("past") for name in inputs):
        message = "the decoder has no past as an input"
        evidence = f"inputs {', '.join(inputs)}; none begins with 'past'"
        effect = "it cannot decode with a KV cache, and MNN's converter fuses its attentions without one"
        cure = "export the checkpoint with 'hf2mnn export'"
        yield Finding(model.path.name, message, evidence, effect, cure)


class _Chain:
    """Follows a graph from an attention's Softmax in both directions, as `FuseAttention.cpp` of MNN 3.6.1 does."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    def before(self, node: onnx.NodeProto | None, position: int = 0) -> onnx.NodeProto | None:
        """Return the node that computes an input."""
        return self.producers.get(node.input[position]) if node is not None and len(node.input) > position else None

    def after(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """Return the only node that reads the first output."""
        consumers = self.consumers.get(node.output[0], []) if node is not None else []
        return consumers[0] if len(consumers) == 1 else None

    def skip_cast(self, node: onnx.NodeProto | None, step: Callable) -> onnx.NodeProto | None:
        return step(node) if _is(node, "Cast") else node

    def ungrouped(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """Skip [Reshape(Expand(Unsqueeze(] of grouped queries."""
        expand = self.before(node) if _is(node, "Reshape") else None
        grouped = self.before(expand) if _is(expand, "Expand") else None
        return self.before(grouped) if _is(grouped, "Unsqueeze") else node

    def mismatch(self, softmax: onnx.NodeProto) -> str | None:
        """Return the first difference from the chain that the converter fuses with a cache, or None."""
        context = self.skip_cast(self.after(softmax), self.after)
        output = self.after(context)
        transposed = _is(output, "Transpose") and _is(self.after(output), "Reshape")
        masked = self.before(softmax)
        scaled = self.skip_cast(self.before(masked, 1 if _is(masked, "Where") else 0), self.before)
        scores = self.before(scaled)
        key, value = self.ungrouped(self.before(scores, 1)), self.ungrouped(self.before(context, 1))
        conditions = [
            (_is(context, "MatMul"), "its softmax output does not feed a MatMul directly"),
            (transposed, "its output is not transposed and reshaped"),
            (_is(masked, "Add", "Where"), "no mask is added to its scores"),
            (_is(scaled, "Mul", "Div"), "its scores are not scaled between MatMul and mask"),
            (_is(scores, "MatMul"), "its scores are not the output of a MatMul"),
            (_is(self.before(scores), "Transpose"), "its query is not transposed right before the MatMul"),
        ]
        for name, node in (("key", key), ("value", value)):
            repeated = f"its {name} is not transposed right before the heads are repeated"
            conditions.append((_is(node, "Transpose"), repeated))
            conditions.append((_is(self.before(node), "Concat"), f"its {name} is not concatenated with a past"))
        return next((reason for holds, reason in conditions if not holds), None)


def _is(node: onnx.NodeProto | None, *types: str) -> bool:
    return node is not None and node.op_type in types


def onnx_attention_chain(model: OnnxFile) -> Iterator[Finding]:
    """Report attentions of a decoder with a past that MNN's converter will not fuse, by the name of their Softmax."""
    graph = model.graph
    if not _is_onnx_decoder(model) or not any(value.name.startswith("past") for value in graph.input):
        return
    chain, softmaxes = _Chain(graph), [node for node in graph.node if node.op_type == "Softmax"]
    unmatched = {node.name or node.output[0]: why for node in softmaxes if (why := chain.mismatch(node))}
    if unmatched:
        first = next(iter(unmatched))
        message = "an attention does not match the operator chain that MNN's converter fuses"
        evidence = f"{len(unmatched)} of {len(softmaxes)}; {first}: {unmatched[first]}"
        effect = "correct in ONNX Runtime; the converter prints success and leaves these layers without a KV cache"
        cure = "export the checkpoint with 'hf2mnn export', and do not optimize the graph afterwards"
        yield Finding(f"{model.path.name}: {first}", message, evidence, effect, cure)


MODEL_CHECKS = (past_key_values_input, attention_not_fused, past_branch_cut, fused_count)
ONNX_CHECKS = (onnx_without_past, onnx_attention_chain)
