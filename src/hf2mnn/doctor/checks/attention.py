"""The KV cache: whether the engine keeps it for every layer of a decoder.

The engine owns the cache. The converter puts it in with `--transformerFuse`, for every attention that is the chain of
`hf2mnn.onnx.attention`, and prints success whatever it has found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import onnx

from hf2mnn.doctor.finding import Finding, Severity
from hf2mnn.doctor.patient import Model, OnnxPatient
from hf2mnn.mnn.graph import Graph

PAST = "past_key_values"
LAYER = re.compile(r"\blayers?[./_](\d+)\b")
CURE = "convert the ONNX of 'hf2mnn onnx' with 'hf2mnn mnn', which gives --transformerFuse and counts what was fused"


def _decodes(model: Model) -> bool:
    names = {*model.graph.inputs, *model.graph.outputs}
    return model.part == "decoder" or (model.part == "" and bool(names & {PAST, "logits", "presents"}))


def _cached(graph: Graph) -> int:
    """Layers whose state the engine keeps: a linear attention's too."""
    return len(graph.fused) + len(graph.of_type("LinearAttention"))


def _open(graph: Graph) -> int:
    """Attentions that are still a chain of operators, or fused ones without a cache."""
    return len(graph.of_type("Softmax")) + len(graph.of_type("Attention")) - len(graph.fused)


def _copied(graph: Graph) -> bool:
    """Whether an output is a bare copy of the past: what `RemovePastKeyValue` of MNN's converter leaves of it."""
    past = {index for op in graph.of_type("Input") if op["name"] == PAST for index in op["outputIndexes"]}
    names = graph.content["tensorName"]
    return any(
        past.intersection(op["inputIndexes"]) and names[op["outputIndexes"][0]] in graph.outputs
        for op in graph.of_type("Reshape")
    )


def _state(graph: Graph) -> str:
    cached, left = _cached(graph), _open(graph)
    if PAST in graph.inputs and left:
        return "not_fused" if cached or _copied(graph) else "not_asked"
    if left and cached:
        return "not_fused"
    return "cut" if left else "fused"


def past_key_values_input(model: Model) -> Iterator[Finding]:
    """Converted without --transformerFuse: the past is an input, every attention a chain of operators."""
    if _decodes(model) and _state(model.graph) == "not_asked":
        yield Finding(
            "past_key_values_input",
            Severity.ERROR,
            model.path.name,
            f"it asks for {PAST}: it was converted without --transformerFuse",
            f"input {PAST}, {_cached(model.graph)} attentions with a KV cache, {_open(model.graph)} without",
            f"the engine, which keeps the cache itself, stops with '{PAST} tensor is input but not found'",
            CURE,
        )


def attention_not_fused(model: Model) -> Iterator[Finding]:
    """Converted with --transformerFuse, and an attention is not the chain that the converter looks for."""
    if _decodes(model) and _state(model.graph) == "not_fused":
        graph = model.graph
        copied = f", the output of the past is a copy of {PAST}" if _copied(graph) else ""
        yield Finding(
            "attention_not_fused",
            Severity.ERROR,
            model.path.name,
            "it was converted with --transformerFuse, but not every attention was fused",
            f"{_cached(graph)} attentions with a KV cache, {_open(graph)} without{copied}",
            "the layers without a cache see only the newest token while an answer is written, if the engine loads it",
            f"{CURE}; 'hf2mnn doctor' on the .onnx file names the attentions that do not match",
        )


def past_branch_cut(model: Model) -> Iterator[Finding]:
    """Nothing asks for the past, and nothing keeps it: it was cut out of the graph to silence the engine."""
    if _decodes(model) and _state(model.graph) == "cut":
        yield Finding(
            "past_branch_cut",
            Severity.ERROR,
            model.path.name,
            "its attentions have neither a past nor a KV cache: the past was cut out of the graph",
            f"no input {PAST}, 0 attentions with a KV cache, {_open(model.graph)} without",
            "it loads, and each new token is written without a look at those before it",
            CURE,
        )


def fused_count(model: Model) -> Iterator[Finding]:
    """As many cached attentions as layers, where none is left unfused: `layer_nums`, else the layers in the names."""
    graph = model.graph
    if not _decodes(model) or _state(graph) != "fused":
        return
    named = {int(found[1]) for op in graph.of_type("Convolution") for found in [LAYER.search(op["name"])] if found}
    layers, source = (model.layers, "layer_nums") if model.layers is not None else (len(named), "names of operators")
    if layers and _cached(graph) != layers:
        yield Finding(
            "fused_count",
            Severity.ERROR,
            model.path.name,
            "it has another number of attentions with a KV cache than layers",
            f"{_cached(graph)} attentions with a KV cache, {layers} layers ({source})",
            "a layer is missing or has no cache, or the files are of two models: the answers are wrong",
            CURE,
        )


# ONNX


def _is_decoder(patient: OnnxPatient) -> bool:
    names = {value.name for value in [*patient.model.graph.input, *patient.model.graph.output]}
    return patient.part == "decoder" or (not patient.part.startswith("vis") and bool(names & {"logits", PAST}))


def onnx_without_past(patient: OnnxPatient) -> Iterator[Finding]:
    """A decoder that was exported without a cache."""
    inputs = [value.name for value in patient.model.graph.input]
    if _is_decoder(patient) and not any(name.startswith("past") for name in inputs):
        yield Finding(
            "onnx_without_past",
            Severity.ERROR,
            patient.path.name,
            "the decoder has no past to read",
            f"inputs {', '.join(inputs)}; none begins with 'past'",
            "it cannot decode with a KV cache, and MNN's converter makes attentions without one of it",
            "export the checkpoint with 'hf2mnn onnx'",
        )


class _Chain:
    """Walks a graph from an attention's Softmax both ways, as `FuseAttention.cpp` of MNN 3.6.1 does from its end."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def before(self, node: onnx.NodeProto | None, place: int = 0) -> onnx.NodeProto | None:
        return self.makers.get(node.input[place]) if node is not None and len(node.input) > place else None

    def after(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        found = self.readers.get(node.output[0], []) if node is not None else []
        return found[0] if len(found) == 1 else None

    def _skip(self, node: onnx.NodeProto | None, kind: str, step: Callable) -> onnx.NodeProto | None:
        return step(node) if _is(node, kind) else node

    def _heads(self, node: onnx.NodeProto | None) -> onnx.NodeProto | None:
        """Past [Reshape(Expand(Unsqueeze(] of grouped queries."""
        expand = self.before(node) if _is(node, "Reshape") else None
        grouped = self.before(expand) if _is(expand, "Expand") else None
        return self.before(grouped) if _is(grouped, "Unsqueeze") else node

    def broken(self, softmax: onnx.NodeProto) -> str | None:
        """What is not as it must be; None where the converter fuses it, with a cache."""
        context = self._skip(self.after(softmax), "Cast", self.after)
        if not _is(context, "MatMul"):
            return "its weights go not straight into a MatMul"
        if not _is(self.after(context), "Transpose") or not _is(self.after(self.after(context)), "Reshape"):
            return "its result is not transposed and reshaped"
        masked = self.before(softmax)
        if not _is(masked, "Add", "Where"):
            return "its scores have no mask added"
        scaled = self._skip(self.before(masked, 1 if masked.op_type == "Where" else 0), "Cast", self.before)
        if not _is(scaled, "Mul", "Div"):
            return "its scores are not scaled between MatMul and mask"
        scores = self.before(scaled)
        if not _is(scores, "MatMul"):
            return "its scores are no MatMul"
        if not _is(self.before(scores), "Transpose"):
            return "its query is not transposed right before the MatMul"
        for name, found in (("key", self.before(scores, 1)), ("value", self.before(context, 1))):
            turned = self._heads(found)
            if not _is(turned, "Transpose"):
                return f"its {name} is not transposed right before the heads are repeated"
            if not _is(self.before(turned), "Concat"):
                return f"its {name} is not joined with a past"
        return None


def _is(node: onnx.NodeProto | None, *kinds: str) -> bool:
    return node is not None and node.op_type in kinds


def onnx_attention_chain(patient: OnnxPatient) -> Iterator[Finding]:
    """Attentions of a decoder with a past that MNN's converter will not fuse, by the name of their Softmax."""
    graph = patient.model.graph
    inputs = [value.name for value in graph.input]
    if not _is_decoder(patient) or not any(name.startswith("past") for name in inputs):
        return
    chain, softmaxes = _Chain(graph), [node for node in graph.node if node.op_type == "Softmax"]
    broken = {node.name or node.output[0]: why for node in softmaxes if (why := chain.broken(node))}
    if broken:
        first = next(iter(broken))
        yield Finding(
            "onnx_attention_chain",
            Severity.ERROR,
            f"{patient.path.name}: {first}",
            "an attention is not the chain of operators that MNN's converter fuses",
            f"{len(broken)} of {len(softmaxes)}; {first}: {broken[first]}",
            "ONNX Runtime computes it rightly; the converter prints success and leaves these layers without a KV cache",
            "export the checkpoint with 'hf2mnn onnx', and let no optimizer change the graph after it",
        )
