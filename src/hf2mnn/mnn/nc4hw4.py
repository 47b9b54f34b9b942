"""Rewrite of a decoder to the NC4HW4 layout, in which MNN's convolutions run, from the first layer to the last.

`restore_linear_layers` converts the layout before and after every linear layer. The operators in between can run in
NC4HW4 as well: a sum with the residual and its normalization in one (LayerNorm with two inputs and outputs), a rotation
with the normalization of each head (RoPE), an attention with outputs in NC4HW4, and silu(gate) * up
(`CPULayerNorm.cpp`, `CPURoPE.cpp`, `CPUAttention.cpp`, `BinaryOpOperation_MUL_SILU` of MNN 3.6.1): 12 operators a layer
instead of about 60.

Tap points keep their names, with shape [tokens, channels, 1, 1] instead of [1, tokens, channels]. The outputs of q_norm
and k_norm are no tensors any more.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf2mnn.mnn.engine_facts import NC4HW4_SINCE
from hf2mnn.mnn.graph import LINEAR, NC4HW4, ROTARY_NORMS, Builder, Graph, Op
from hf2mnn.onnx.deepstack import DEEPSTACK

PLAIN = "NCHW"  # layout of a decoder that is not rewritten
LAYER = re.compile(r"(?P<layer>.+\.layers\.\d+)\.self_attn\.q_proj")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD = "logits"
LAYOUT_OPS = ("Reshape", "Permute", "ConvertTensor", "Const")  # operators that change shape or layout, and no value
SUM = ("BinaryOp", "ADD")
REPLACED_PER_LAYER = {
    SUM: 4,
    ("BinaryOp", "MUL"): 5,
    ("UnaryOp", "NEG"): 2,
    ("UnaryOp", "SILU"): 1,
    ("Concat", None): 2,
    ("StridedSlice", None): 4,
}
"""Operators of a layer that the rewrite replaces: residual sums, rotation of queries and keys, gate."""


@dataclass(frozen=True)
class Layout:
    """Layout of a decoder."""

    name: str  # "NC4HW4", or "NCHW" if the decoder was not rewritten, which is slower
    reason: str = ""  # why it was not rewritten


def _kind(op: Op) -> tuple[str, str | None]:
    """Return the type of an operator, and the kind of an elementwise one."""
    return op["type"], (op.get("main") or {}).get("opType")


class _Decoder:
    """Parts of a decoder of layers with pre-norm, rotated queries and keys, and gated MLP.

    Queries and keys may be normalized before the rotation, and deepstack may add to the outputs of the first layers.
    `producers` and `consumers` are operators by the index of a tensor, `linear` are convolutions by the names of their
    linear layers, `norms` and `head_norms` are normalizations of the stream, and of queries and keys, by name.
    """

    def __init__(self, graph: Graph) -> None:
        self.names = graph.content["tensorName"]
        self.ops = graph.ops
        self.producers = {index: op for op in graph.ops for index in op["outputIndexes"]}
        self.consumers: dict[int, list[Op]] = defaultdict(list)
        for op in graph.ops:
            for index in op.get("inputIndexes", []):
                self.consumers[index].append(op)
        self.linear = {op["name"].removesuffix(LINEAR): op for op in graph.of_type("Convolution")}
        self.attentions = graph.fused
        self.layers = [match["layer"] for name in self.linear if (match := LAYER.fullmatch(name))]
        norms = {op["name"]: op for op in graph.of_type("LayerNorm")}
        of_heads = {f"{layer}.self_attn.{name}" for layer in self.layers for name in ROTARY_NORMS}
        self.head_norms = {name: op for name, op in norms.items() if name in of_heads}
        self.norms = {name: op for name, op in norms.items() if name not in of_heads}
        splits = [op for op in graph.of_type("Slice") if [self.names[i] for i in op["inputIndexes"]] == [DEEPSTACK]]
        self.deepstack = [index for op in splits for index in op["outputIndexes"]]

    def mismatch(self) -> str:
        """Return the first difference from a decoder that can be rewritten, "" if there is none."""
        count = len(self.layers)
        linears = {f"{layer}.{name}" for layer in self.layers for name in LINEARS} | {HEAD}
        norms = {f"{layer}.{name}" for layer in self.layers for name in NORMS}
        if not count:
            return "it has no layers with a self_attn.q_proj"
        if differing := sorted(set(self.linear) ^ linears):
            return f"its layers do not have the usual linear layers, see {differing[0]}"
        if not norms < set(self.norms) or len(self.norms) != len(norms) + 1:
            return f"it has {len(self.norms)} normalizations of the stream instead of {len(norms) + 1}"
        if len(self.attentions) != count:
            return f"{len(self.attentions)} of its {count} attentions are fused"
        activations = [op for op in self.ops if _kind(op) == ("UnaryOp", "SILU")]
        gated = {self.origin(op["inputIndexes"][0], "Reshape", "ConvertTensor") for op in activations}
        for name in (f"{layer}.mlp.gate_proj" for layer in self.layers):
            if self.linear[name]["outputIndexes"][0] not in gated:
                return f"the activation of {name} is not SiLU"
        if len(self.head_norms) not in (0, len(ROTARY_NORMS) * count):
            return "not all queries and keys are normalized"
        if others := [name for name in self.head_norms if not self._is_rotated_next(name)]:
            return f"{others[0]} is not an RMS norm of each head between a projection and its rotation"
        if len(self.deepstack) > count or not all(map(self._is_added, self.layers, self.deepstack)):
            return "deepstack is not added to the outputs of the first layers"
        return ""

    def _is_rotated_next(self, name: str) -> bool:
        """Check that a normalization is of each head of a projection, and that only the rotation reads its output."""
        norm, main = self.head_norms[name], self.head_norms[name]["main"]
        projection = self.linear[f"{name.removesuffix('_norm')}_proj"]["outputIndexes"][0]
        (view,) = norm["inputIndexes"]
        consumers = [op["type"] for op in self.consumers[norm["outputIndexes"][0]]]
        return (
            main.get("useRMSNorm", False)
            and (main["axis"], main["group"]) == ([-1], 1)
            and len(self.producers[view]["inputIndexes"]) == 2
            and self.origin(view, "Reshape", "ConvertTensor") == projection
            and consumers == ["Permute"]
        )

    def _is_added(self, layer: str, index: int) -> bool:
        """Check that the only consumer of a tensor of deepstack adds it to the output of a layer."""
        consumers = self.consumers[index]
        sums = [op for op in consumers if _kind(op) == SUM]
        terms = {self.names[term] for op in sums for term in op["inputIndexes"]}
        return len(sums) == len(consumers) == 1 and terms == {layer, self.names[index]}

    def origin(self, index: int, *types: str) -> int:
        """Return the tensor before a chain of operators of these types that ends in a tensor."""
        while self.producers[index]["type"] in types:
            index = self.producers[index]["inputIndexes"][0]
        return index

    def rotation(self) -> tuple[int, int, int]:
        """Return the tensors of cosines and sines, which all layers share, and the size of a head."""
        rotated = self.producers[self.origin(self.attentions[0]["inputIndexes"][0], "Permute", "ConvertTensor")]
        products = [self.producers[index] for index in rotated["inputIndexes"]]
        cosine = next(op for op in products if self.producers[op["inputIndexes"][0]]["type"] != "Concat")
        sine = next(op for op in products if op is not cosine)
        view = self.producers[self.origin(cosine["inputIndexes"][0], "Permute", "LayerNorm")]
        shape = self.producers[view["inputIndexes"][1]]["main"]["int32s"]
        return cosine["inputIndexes"][1], sine["inputIndexes"][1], shape[-1]

    def last_rows(self) -> Op:
        """Return the slice by `logits_index`."""
        slices = (op for op in self.ops if op["type"] == "StridedSlice")
        return next(op for op in slices if self.names[op["inputIndexes"][1]] == "logits_index")


class _Rewriter(Builder):
    """Collects the operators of the rewritten decoder."""

    def take(self, op: Op, inputs: list[int], *outputs: str, **main: Any) -> list[int]:
        """Add a copy of an operator with other inputs and outputs; return its output tensors."""
        tensors = [self.tensor(name) for name in outputs]
        taken = copy.deepcopy(op) | {"inputIndexes": inputs, "outputIndexes": tensors, "defaultDimentionFormat": NC4HW4}
        taken["main"] |= main
        self.ops.append(taken)
        return tensors

    def binary(self, kind: str, inputs: list[int], name: str) -> int:
        """Add an elementwise operator of two inputs; return its output tensor."""
        main = {"opType": kind, "T": "DT_FLOAT", "activationType": 0}
        return self.add("BinaryOp", main, name, inputs, layout=NC4HW4)

    def deepstack(self, source: int) -> int:
        """Move the axes of a deepstack tensor, [1, tokens or 1, hidden or 1], to [tokens or 1, hidden or 1, 1, 1].

        The result is not converted to NC4HW4: the engine's shape code treats it as NHWC, its kernels as NCHW, and the
        sum accepts both.
        """
        name = self.names[source]
        permuted = self.add("Permute", {"dims": [1, 2, 0]}, f"{name}__turned", [source])
        return self.reshape(f"{name}__flat", [0, 0, 1, 1], permuted)


def _head_norm(norm: Op, gamma: np.ndarray) -> dict[str, Any]:
    """Return a normalization as a part of RoPE, with its gamma in the graph; keys in the order of a dump."""
    main = {key: value for key, value in norm["main"].items() if key != "external"}
    axis, epsilon = main.pop("axis"), main.pop("epsilon")
    return {"axis": axis, "epsilon": epsilon, "gamma": [float(value) for value in gamma], **main}


def _rewrite(graph: Graph, decoder: _Decoder, vectors: dict[str, np.ndarray]) -> list[Op]:
    new, names = _Rewriter(graph), decoder.names
    cosines, sines, head_dim = decoder.rotation()
    mask = decoder.attentions[0]["inputIndexes"][3]

    def linear(name: str, source: int) -> int:
        return new.take(decoder.linear[name], [source], name)[0]

    def size(name: str, channels: str) -> int:
        return decoder.linear[name]["main"]["common"][channels]

    hidden = size(f"{decoder.layers[0]}.self_attn.q_proj", "inputCount")
    flat = new.reshape("inputs_embeds__flat", [-1, hidden, 1, 1], names.index("inputs_embeds"))
    stream = new.convert_layout("inputs_embeds__packed", "NCHW", NC4HW4, flat)
    # The sum of the stream and a layer's last output, `residual`, is part of the next normalization.
    residual, sum_name, deepstack = None, "", iter(decoder.deepstack)
    for layer, attention in zip(decoder.layers, decoder.attentions, strict=True):
        norm, attn = f"{layer}.input_layernorm", f"{layer}.self_attn"
        if residual is None:
            (x,) = new.take(decoder.norms[norm], [stream], norm)
        else:
            stream, x = new.take(decoder.norms[norm], [stream, residual], sum_name, norm)
        query, key, value = (linear(f"{attn}.{name}_proj", x) for name in "qkv")
        heads = [size(f"{attn}.{name}_proj", "outputCount") // head_dim for name in "qk"]
        main = {"rope_cut_head_dim": head_dim, "num_head": heads[0], "kv_num_head": heads[1], "head_dim": head_dim}
        for kind in ROTARY_NORMS if decoder.head_norms else ():
            main[kind] = _head_norm(decoder.head_norms[f"{attn}.{kind}"], vectors[f"{attn}.{kind}.weight"])
        rotated = [new.tensor(f"{attn}.query"), new.tensor(f"{attn}.key")]
        new.add("RoPE", main, f"{attn}.key", [query, key, cosines, sines], rotated)
        (context,) = new.take(attention, [*rotated, value, mask], f"{attn}.context", output_c4=True)
        projected = linear(f"{attn}.o_proj", context)
        norm = f"{layer}.post_attention_layernorm"
        stream, x = new.take(decoder.norms[norm], [stream, projected], f"{norm}__sum", norm)
        gate, up = linear(f"{layer}.mlp.gate_proj", x), linear(f"{layer}.mlp.up_proj", x)
        gated = new.binary("MUL_SILU", [up, gate], f"{layer}.mlp__gated")
        residual, sum_name = linear(f"{layer}.mlp.down_proj", gated), layer
        if (added := next(deepstack, None)) is not None:
            # LayerNorm's two inputs must have one shape; for text alone the engine feeds a single zero here.
            total = new.binary("ADD", [stream, residual], layer)
            stream = new.binary("ADD", [total, new.deepstack(added)], f"{names[added]}__sum")
            residual = None
    if residual is not None:
        stream = new.binary("ADD", [stream, residual], sum_name)
    axis = {"dims": [1], "dataFormat": "NCHW", "dataType": "DT_INT32", "int32s": [0]}
    first_axis = new.add("Const", axis, "rows_axis", [])
    new.ops[-1].pop("inputIndexes")
    slice_op = decoder.last_rows()
    _, begin, end, _, *rest = slice_op["inputIndexes"]
    (rows,) = new.take(slice_op, [stream, begin, end, first_axis, *rest], "last_rows")
    (last_norm,) = set(decoder.norms) - {f"{layer}.{name}" for layer in decoder.layers for name in NORMS}
    (normed,) = new.take(decoder.norms[last_norm], [rows], last_norm)
    (logits,) = new.take(decoder.linear[HEAD], [normed], f"{HEAD}__packed")
    plain = new.convert_layout(f"{HEAD}__unpacked", NC4HW4, "NCHW", logits)
    new.reshape(HEAD, [1, -1, size(HEAD, "outputCount")], plain, [names.index(HEAD)])
    return new.ops


def _still_needed(ops: list[Op], new: list[Op]) -> list[Op]:
    """Return the old operators that the new ones depend on, in the order of execution."""
    used = {index for op in new for index in op.get("inputIndexes", [])}
    needed = []
    for op in reversed(ops):
        if used.intersection(op["outputIndexes"]):
            needed.append(op)
            used.update(op.get("inputIndexes", []))
    return needed[::-1]


def _unexpected(dropped: list[Op], decoder: _Decoder) -> str:
    """Return the first kind of operator that the rewrite would drop and does not replace, "" if there is none."""
    computing = Counter(_kind(op) for op in dropped if op["type"] not in LAYOUT_OPS)
    expected = Counter({kind: count * len(decoder.layers) for kind, count in REPLACED_PER_LAYER.items()})
    expected += Counter({("LayerNorm", None): len(decoder.head_norms), SUM: len(decoder.deepstack)})
    for kind in computing | expected:
        if computing[kind] != expected[kind]:
            return f"it has {computing[kind]} operators of type {kind[1] or kind[0]} instead of {expected[kind]}"
    return ""


def supports_nc4hw4(release: str) -> bool:
    """Return whether a release of MNN, such as "3.6.1", has these operators; older converters crash on RoPE."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3]) >= NC4HW4_SINCE


def to_nc4hw4(graph: Graph, vectors: dict[str, np.ndarray], release: str) -> Layout:
    """Rewrite a decoder to the NC4HW4 layout, in place, after `restore_linear_layers`; return its layout.

    A decoder of another structure stays unchanged. `vectors` are the float32 initializers of the ONNX graph with one
    axis, by name: gamma of normalizations in RoPE. `release` is the release of MNN that runs the graph.
    """
    if not supports_nc4hw4(release):
        required = ".".join(map(str, NC4HW4_SINCE))
        return Layout(PLAIN, f"MNN {release} does not have its operators, MNN {required} does")
    decoder = _Decoder(graph)
    if reason := decoder.mismatch():
        return Layout(PLAIN, reason)
    old_count = len(decoder.names)
    new = _rewrite(graph, decoder, vectors)
    needed = _still_needed(graph.ops, new)
    copied = [*graph.of_type("Input", "Convolution", "Attention"), *decoder.norms.values(), decoder.last_rows()]
    kept = {id(op) for op in [*needed, *copied]}
    dropped = [op for op in graph.ops if id(op) not in kept]
    if reason := _unexpected(dropped, decoder):
        del graph.content["tensorName"][old_count:]
        return Layout(PLAIN, reason)
    inputs = graph.of_type("Input")
    graph.content["oplists"] = [*inputs, *(op for op in needed if op["type"] != "Input"), *new]
    new_names = set(decoder.names[old_count:])
    for index, name in enumerate(decoder.names[:old_count]):
        if name in new_names:
            decoder.names[index] = f"{name}__before"
    return Layout(NC4HW4)
