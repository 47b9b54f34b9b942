"""Checks whether the engine keeps a KV cache for every layer of a decoder.

The engine owns the cache. The converter inserts it with `--transformerFuse`, for every attention that matches the
operator chain of `hf2mnn.onnx.attention`, and prints success whatever it has matched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx

from hf2mnn.doctor.artifacts import MnnModel, OnnxFile
from hf2mnn.doctor.findings import Finding
from hf2mnn.mnn.graph import Graph

PAST = "past_key_values"
CONVERT = "run 'hf2mnn convert' on the output of 'hf2mnn export': it passes --transformerFuse and counts the fusions"


def _is_decoder(model: MnnModel) -> bool:
    names = {*model.graph.inputs, *model.graph.outputs}
    return model.part == "decoder" or (model.part == "" and bool(names & {PAST, "logits", "presents"}))


def _cached(graph: Graph) -> int:
    """Count the layers whose state the engine keeps, linear attention included."""
    return len(graph.fused) + len(graph.of_type("LinearAttention"))


def _uncached(graph: Graph) -> int:
    """Count the attentions that are still an operator chain, or fused without a cache."""
    return len(graph.of_type("Softmax")) + len(graph.of_type("Attention")) - len(graph.fused)


def _counts(graph: Graph) -> str:
    return f"{_cached(graph)} attentions with a KV cache, {_uncached(graph)} without"


def _outputs_past(graph: Graph) -> bool:
    """Return whether an output is a copy of the past, which the converter's `RemovePastKeyValue` leaves."""
    past = {index for op in graph.of_type("Input") if op["name"] == PAST for index in op["outputIndexes"]}
    names = graph.content["tensorName"]
    return any(
        past.intersection(op["inputIndexes"]) and names[op["outputIndexes"][0]] in graph.outputs
        for op in graph.of_type("Reshape")
    )


def _state(graph: Graph) -> str:
    """Return "fused", "no_flag" (converted without --transformerFuse), "partial" or "cut"."""
    cached, uncached = _cached(graph), _uncached(graph)
    if PAST in graph.inputs and uncached:
        return "partial" if cached or _outputs_past(graph) else "no_flag"
    if uncached:
        return "partial" if cached else "cut"
    return "fused"


def past_key_values_input(model: MnnModel) -> Iterator[Finding]:
    """Report a decoder converted without --transformerFuse: the past is an input, attentions are operator chains."""
    if _is_decoder(model) and _state(model.graph) == "no_flag":
        message = f"the decoder has an input {PAST}: it was converted without --transformerFuse"
        evidence = f"input {PAST}, {_counts(model.graph)}"
        effect = f"the engine, which keeps the cache itself, stops with '{PAST} tensor is input but not found'"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=CONVERT)


def attention_not_fused(model: MnnModel) -> Iterator[Finding]:
    """Report attentions that --transformerFuse did not match."""
    if _is_decoder(model) and _state(model.graph) == "partial":
        copied = f", the output of the past is a copy of {PAST}" if _outputs_past(model.graph) else ""
        message = "the converter fused only some attentions, although it ran with --transformerFuse"
        evidence = f"{_counts(model.graph)}{copied}"
        effect = "if the engine loads it, layers without a cache attend only to the newest token during decoding"
        cure = f"{CONVERT}; 'hf2mnn doctor' on the .onnx file names the attentions that do not match"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=cure)


def past_branch_cut(model: MnnModel) -> Iterator[Finding]:
    """Report a decoder whose past was removed from the graph, so that the engine does not ask for it."""
    if _is_decoder(model) and _state(model.graph) == "cut":
        message = "the attentions have neither a past nor a KV cache: the past was removed from the graph"
        evidence = f"no input {PAST}, {_counts(model.graph)}"
        effect = "the engine loads it, and each new token is generated without the tokens before it"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=CONVERT)


def fused_count(model: MnnModel) -> Iterator[Finding]:
    """Compare the number of cached attentions with `layer_nums`, or with the layers in the operator names."""
    graph = model.graph
    if not _is_decoder(model) or _state(graph) != "fused":
        return
    layers, source = (model.layers, "layer_nums") if model.layers is not None else (model.layer_count, "operator names")
    if layers and _cached(graph) != layers:
        message = "the number of attentions with a KV cache differs from the number of layers"
        evidence = f"{_cached(graph)} attentions with a KV cache, {layers} layers ({source})"
        effect = "wrong output: a layer is missing or has no cache, or the files are of two models"
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=CONVERT)


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
        yield Finding(where=model.path.name, message=message, evidence=evidence, effect=effect, cure=cure)


class _Chain:
    """Follows a graph from an attention's Softmax in both directions, as `FuseAttention.cpp` of MNN 3.6.1 does."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def before(self, node: onnx.NodeProto | None, position: int = 0) -> onnx.NodeProto | None:
        """Return the node that computes an input."""
        return self.producers.get(node.input[position]) if node is not None and len(node.input) > position else None

    def after(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """Return the only node that reads the first output."""
        consumers = self.consumers.get(node.output[0], []) if node is not None else []
        return consumers[0] if len(consumers) == 1 else None

    def _skip_cast(self, node: onnx.NodeProto | None, step: Callable) -> onnx.NodeProto | None:
        return step(node) if _is(node, "Cast") else node

    def _ungrouped(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """Skip [Reshape(Expand(Unsqueeze(] of grouped queries."""
        expand = self.before(node) if _is(node, "Reshape") else None
        grouped = self.before(expand) if _is(expand, "Expand") else None
        return self.before(grouped) if _is(grouped, "Unsqueeze") else node

    def mismatch(self, softmax: onnx.NodeProto) -> str | None:
        """Return the first difference from the chain that the converter fuses with a cache, or None."""
        context = self._skip_cast(self.after(softmax), self.after)
        if not _is(context, "MatMul"):
            return "its softmax output does not feed a MatMul directly"
        if not _is(self.after(context), "Transpose") or not _is(self.after(self.after(context)), "Reshape"):
            return "its output is not transposed and reshaped"
        masked = self.before(softmax)
        if not _is(masked, "Add", "Where"):
            return "no mask is added to its scores"
        scaled = self._skip_cast(self.before(masked, 1 if masked.op_type == "Where" else 0), self.before)
        if not _is(scaled, "Mul", "Div"):
            return "its scores are not scaled between MatMul and mask"
        scores = self.before(scaled)
        if not _is(scores, "MatMul"):
            return "its scores are not the output of a MatMul"
        if not _is(self.before(scores), "Transpose"):
            return "its query is not transposed right before the MatMul"
        for name, node in (("key", self.before(scores, 1)), ("value", self.before(context, 1))):
            transposed = self._ungrouped(node)
            if not _is(transposed, "Transpose"):
                return f"its {name} is not transposed right before the heads are repeated"
            if not _is(self.before(transposed), "Concat"):
                return f"its {name} is not concatenated with a past"
        return None


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
        yield Finding(where=f"{model.path.name}: {first}", message=message, evidence=evidence, effect=effect, cure=cure)


MODEL_CHECKS = (past_key_values_input, attention_not_fused, past_branch_cut, fused_count)
ONNX_CHECKS = (onnx_without_past, onnx_attention_chain)
