"""Checks whether the engine keeps a KV cache for every layer of a decoder.

The engine owns the cache. The converter inserts it with `--transformerFuse`, for every attention that matches the
operator chain of `hf2mnn.onnx.attention`, and prints success whatever it has matched.
"""

from __future__ import annotations

from collections import defaultdict

from onnx import GraphProto, NodeProto

from hf2mnn.doctor.artifacts import MnnModel, OnnxFile
from hf2mnn.doctor.findings import Finding, Findings
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
        past.intersection(op.get("inputIndexes", [])) and names[op["outputIndexes"][0]] in graph.outputs
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
    if cached or _outputs_past(graph):
        return "partial"
    return "no_flag" if PAST in graph.inputs else "cut"


def past_key_values_input(model: MnnModel) -> Findings:
    """Report a decoder converted without --transformerFuse: the past is an input, attentions are operator chains."""
    if _state(model) == "no_flag":
        message = f"the decoder has an input {PAST}: it was converted without --transformerFuse"
        effect = f"the engine, which keeps the cache itself, stops with '{PAST} tensor is input but not found'"
        yield Finding(model.path.name, message, f"input {PAST}, {_counted(model.graph)}", effect, CONVERT)


def attention_not_fused(model: MnnModel) -> Findings:
    """Report attentions that --transformerFuse did not match."""
    if _state(model) == "partial":
        copied = f", the output of the past is a copy of {PAST}" if _outputs_past(model.graph) else ""
        message = "the converter fused only some attentions, although it ran with --transformerFuse"
        effect = "if the engine loads it, layers without a cache attend only to the newest token during decoding"
        cure = f"{CONVERT}; 'hf2mnn doctor' on the .onnx file names the attentions that do not match"
        yield Finding(model.path.name, message, f"{_counted(model.graph)}{copied}", effect, cure)


def past_branch_cut(model: MnnModel) -> Findings:
    """Report a decoder whose past was removed from the graph, so that the engine does not ask for it."""
    if _state(model) == "cut":
        message = "the attentions have neither a past nor a KV cache: the past was removed from the graph"
        effect = "the engine loads it, and each new token is generated without the tokens before it"
        yield Finding(model.path.name, message, f"no input {PAST}, {_counted(model.graph)}", effect, CONVERT)


def fused_count(model: MnnModel) -> Findings:
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


def onnx_without_past(model: OnnxFile) -> Findings:
    """Report an ONNX decoder that was exported without a KV cache."""
    inputs = [value.name for value in model.graph.input]
    if _is_onnx_decoder(model) and not any(name.startswith("past") for name in inputs):
        message = "the decoder has no past as an input"
        evidence = f"inputs {', '.join(inputs)}; none begins with 'past'"
        effect = "it cannot decode with a KV cache, and MNN's converter fuses its attentions without one"
        yield Finding(model.path.name, message, evidence, effect, "export the checkpoint with 'hf2mnn export'")


class _Chain:
    """Follows a graph from an attention's Softmax in both directions, as `FuseAttention.cpp` of MNN 3.6.1 does.

    An empty node stands for one that does not exist.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.producers = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    def before(self, node: NodeProto, position: int = 0) -> NodeProto:
        """Return the node that computes an input."""
        name = node.input[position] if len(node.input) > position else None
        return self.producers.get(name, NodeProto())

    def after(self, node: NodeProto) -> NodeProto:
        """Return the only node that reads the first output."""
        consumers = self.consumers[node.output[0]] if node.output else []
        return consumers[0] if len(consumers) == 1 else NodeProto()

    def ungrouped(self, node: NodeProto) -> NodeProto:
        """Skip [Reshape(Expand(Unsqueeze(] of grouped queries."""
        expand = self.before(node)
        grouped = self.before(expand)
        chain = [each.op_type for each in (node, expand, grouped)]
        return self.before(grouped) if chain == ["Reshape", "Expand", "Unsqueeze"] else node

    def mismatch(self, softmax: NodeProto) -> str | None:
        """Return the first difference from the chain that the converter fuses with a cache, or None."""
        context, masked = self.after(softmax), self.before(softmax)
        scaled = self.before(masked, 1 if masked.op_type == "Where" else 0)
        context = self.after(context) if context.op_type == "Cast" else context
        scaled = self.before(scaled) if scaled.op_type == "Cast" else scaled
        scores, output = self.before(scaled), self.after(context)
        transposed = (output.op_type, self.after(output).op_type) == ("Transpose", "Reshape")
        conditions = [
            (context.op_type == "MatMul", "its softmax output does not feed a MatMul directly"),
            (transposed, "its output is not transposed and reshaped"),
            (masked.op_type in ("Add", "Where"), "no mask is added to its scores"),
            (scaled.op_type in ("Mul", "Div"), "its scores are not scaled between MatMul and mask"),
            (scores.op_type == "MatMul", "its scores are not the output of a MatMul"),
            (self.before(scores).op_type == "Transpose", "its query is not transposed right before the MatMul"),
        ]
        for name, node in (("key", self.before(scores, 1)), ("value", self.before(context, 1))):
            heads = self.ungrouped(node)
            repeated = f"its {name} is not transposed right before the heads are repeated"
            conditions.append((heads.op_type == "Transpose", repeated))
            conditions.append((self.before(heads).op_type == "Concat", f"its {name} is not concatenated with a past"))
        return next((reason for holds, reason in conditions if not holds), None)


def onnx_attention_chain(model: OnnxFile) -> Findings:
    """Report attentions of a decoder with a past that MNN's converter will not fuse, by the name of their Softmax."""
    if not _is_onnx_decoder(model) or not any(value.name.startswith("past") for value in model.graph.input):
        return
    chain, softmaxes = _Chain(model.graph), [node for node in model.graph.node if node.op_type == "Softmax"]
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
