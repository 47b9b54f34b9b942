"""The decoder as MNN's engine likes it best: in the packed layout of its convolutions from the first layer to the last.

`show_linear_layers` brings every linear layer's input into that layout and its output back. What lies between them can
do without: MNN has operators for the sum with the residual and its normalization (LayerNorm with two inputs and two
outputs), the rotation of queries and keys with a normalization of each head before it (RoPE), an attention that reads
values and writes its output packed, and silu(gate) * up (`CPULayerNorm.cpp`, `CPURoPE.cpp`, `CPUAttention.cpp`,
`BinaryOpOperation_MUL_SILU` of MNN 3.6.1). A layer has 12 operators then, instead of about 60.

Values that are points keep their names: they are [tokens, channels, 1, 1] instead of [1, tokens, channels]. What q_norm
and k_norm give is no value any more.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import numpy as np

from hf2mnn.mnn.build import Op, change_layout, operator, reshape
from hf2mnn.mnn.graph import LINEAR, PACKED, ROTARY_NORMS, Graph
from hf2mnn.onnx.deepstack import DEEPSTACK

LAYER = re.compile(r"(?P<layer>.+\.layers\.\d+)\.self_attn\.q_proj")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD = "logits"
SINCE = (3, 6, 1)
"""MNN's first release with all of these operators."""
FORMS = ("Reshape", "Permute", "ConvertTensor", "Const")
"""Operators that change the form of values, and no value."""
STEPS = {
    ("BinaryOp", "ADD"): 4,
    ("BinaryOp", "MUL"): 5,
    ("UnaryOp", "NEG"): 2,
    ("UnaryOp", "SILU"): 1,
    ("Concat", None): 2,
    ("StridedSlice", None): 4,
}
"""What else a layer computes: sums with the residual, halves of queries and keys turned, the gate."""
NORMALIZED = ("LayerNorm", None)
ADDED = ("BinaryOp", "ADD")


class _Decoder:
    """The parts of a decoder of layers with a pre-norm, rotated queries and keys, and a gated MLP; queries and keys may
    be normalized before, and deepstack may add to what the first layers give.
    """

    def __init__(self, graph: Graph) -> None:
        self.names = graph.content["tensorName"]
        self.ops = graph.ops
        self.makers = {index: op for op in graph.ops for index in op["outputIndexes"]}
        self.readers: dict[int, list[Op]] = {}
        for op in graph.ops:
            for index in op.get("inputIndexes", []):
                self.readers.setdefault(index, []).append(op)
        self.linear = {op["name"].removesuffix(LINEAR): op for op in graph.of_type("Convolution")}
        self.attentions = graph.fused
        found = [LAYER.fullmatch(name) for name in self.linear]
        self.layers = [match["layer"] for match in found if match]
        norms = {op["name"]: op for op in graph.of_type("LayerNorm")}
        of_heads = {f"{layer}.self_attn.{name}" for layer in self.layers for name in ROTARY_NORMS}
        self.head_norms = {name: op for name, op in norms.items() if name in of_heads}
        self.norms = {name: op for name, op in norms.items() if name not in of_heads}
        splits = [op for op in graph.of_type("Slice") if [self.names[i] for i in op["inputIndexes"]] == [DEEPSTACK]]
        self.deepstack = [index for op in splits for index in op["outputIndexes"]]
        """What is added to each of the first layers' output."""

    @property
    def understood(self) -> bool:
        """Whether the parts are there that are rewritten, each as often as there are layers."""
        count = len(self.layers)
        wanted = {f"{layer}.{name}" for layer in self.layers for name in LINEARS} | {HEAD}
        norms = {f"{layer}.{name}" for layer in self.layers for name in NORMS}
        return (
            count > 0
            and set(self.linear) == wanted
            and norms < set(self.norms)
            and len(self.norms) == len(norms) + 1
            and len(self.attentions) == count
            and all(self.gated(layer) for layer in self.layers)
            and len(self.head_norms) in (0, len(ROTARY_NORMS) * count)
            and all(self.rotated_next(name) for name in self.head_norms)
            and len(self.deepstack) <= count
            and all(map(self.added, self.layers, self.deepstack))
        )

    @property
    def replaced(self) -> Counter[tuple[str, str | None]]:
        """How often each kind of step is computed by an operator that falls away."""
        steps = Counter({step: each * len(self.layers) for step, each in STEPS.items()})
        return steps + Counter({NORMALIZED: len(self.head_norms), ADDED: len(self.deepstack)})

    def rotated_next(self, name: str) -> bool:
        """Whether a normalization is of what a projection gives, each head by itself, and only that is rotated."""
        norm, main = self.head_norms[name], self.head_norms[name]["main"]
        projection = self.linear[f"{name.removesuffix('_norm')}_proj"]["outputIndexes"][0]
        (view,) = norm["inputIndexes"]
        readers = [op["type"] for op in self.readers.get(norm["outputIndexes"][0], [])]
        return (
            main.get("useRMSNorm", False)
            and (main["axis"], main["group"]) == ([-1], 1)
            and len(self.makers[view]["inputIndexes"]) == 2
            and self.through(view, "Reshape", "ConvertTensor") == projection
            and readers == ["Permute"]
        )

    def added(self, layer: str, seen: int) -> bool:
        """Whether what deepstack adds is added to what the layer gives, and read by nothing else."""
        readers = self.readers.get(seen, [])
        sums = [op for op in readers if op["type"] == "BinaryOp" and op["main"]["opType"] == "ADD"]
        read = {self.names[index] for op in sums for index in op["inputIndexes"]}
        return len(sums) == len(readers) == 1 and read == {layer, self.names[seen]}

    def gated(self, layer: str) -> bool:
        """Whether the activation is SiLU, and of the gate."""
        gate = self.linear[f"{layer}.mlp.gate_proj"]
        activations = [op for op in self.ops if op["type"] == "UnaryOp" and op["main"]["opType"] == "SILU"]
        sources = [self.through(op["inputIndexes"][0], "Reshape", "ConvertTensor") for op in activations]
        return gate["outputIndexes"][0] in sources

    def through(self, index: int, *types: str) -> int:
        """Where a value comes from, past operators that only change its form."""
        while self.makers[index]["type"] in types:
            index = self.makers[index]["inputIndexes"][0]
        return index

    def rotation(self) -> tuple[int, int, int]:
        """(cosines, sines, size of a head) of the first layer's query; those of all layers are the same."""
        turned = self.makers[self.through(self.attentions[0]["inputIndexes"][0], "Permute", "ConvertTensor")]
        products = [self.makers[index] for index in turned["inputIndexes"]]
        straight = next(op for op in products if self.makers[op["inputIndexes"][0]]["type"] != "Concat")
        crossed = next(op for op in products if op is not straight)
        view = self.makers[self.through(straight["inputIndexes"][0], "Permute", "LayerNorm")]
        shape = self.makers[view["inputIndexes"][1]]["main"]["int32s"]
        return straight["inputIndexes"][1], crossed["inputIndexes"][1], shape[-1]

    def last_rows(self) -> Op:
        """The slice by `logits_index`."""
        return next(op for op in self.ops if op["type"] == "StridedSlice" and self._is_index(op["inputIndexes"][1]))

    def _is_index(self, index: int) -> bool:
        return self.names[index] == "logits_index"


class _Packed:
    """Collects operators of the new form."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.ops = names, []

    def value(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def add(self, kind: str, main_type: str, main: Any, read: list[int], *made: str, form: str = PACKED) -> list[int]:
        outputs = [self.value(name) for name in made]
        self.ops.append(operator(kind, main_type, main, made[-1], read, outputs, form))
        return outputs

    def take(self, op: Op, read: list[int], *made: str, **main: Any) -> list[int]:
        """An operator as it is, with other inputs and outputs."""
        outputs = [self.value(name) for name in made]
        taken = copy.deepcopy(op) | {"inputIndexes": read, "outputIndexes": outputs, "defaultDimentionFormat": PACKED}
        taken["main"] |= main
        self.ops.append(taken)
        return outputs

    def binary(self, kind: str, read: list[int], name: str) -> int:
        main = {"opType": kind, "T": "DT_FLOAT", "activationType": 0}
        return self.add("BinaryOp", "BinaryOp", main, read, name)[0]

    def seen(self, read: int) -> int:
        """What deepstack adds [1, tokens or 1, hidden or 1] with the stream's axes: [tokens or 1, hidden or 1, 1, 1].

        It is not brought into the packed layout: the engine calls it NHWC in one place and NCHW in another, and the sum
        takes either.
        """
        turned, flat = self.value(f"{self.names[read]}__turned"), self.value(f"{self.names[read]}__flat")
        self.ops.append(operator("Permute", "Permute", {"dims": [1, 2, 0]}, self.names[turned], [read], [turned]))
        # 0 leaves a side as it is.
        self.ops.append(reshape(self.names[flat], [0, 0, 1, 1], turned, flat))
        return flat


def _head_norm(norm: Op, gamma: np.ndarray) -> dict[str, Any]:
    """A normalization as the rotation does it, which reads nothing from the weight file."""
    kept = {key: value for key, value in norm["main"].items() if key != "external"}
    return kept | {"gamma": [float(value) for value in gamma]}


def _rewrite(decoder: _Decoder, vectors: dict[str, np.ndarray]) -> list[Op]:
    made, names = _Packed(decoder.names), decoder.names
    cosines, sines, size = decoder.rotation()
    mask = decoder.attentions[0]["inputIndexes"][3]
    embeds = names.index("inputs_embeds")
    hidden = decoder.linear[f"{decoder.layers[0]}.self_attn.q_proj"]["main"]["common"]["inputCount"]

    def linear(name: str, read: int) -> int:
        return made.take(decoder.linear[name], [read], name)[0]

    flat, stream = made.value("inputs_embeds__flat"), made.value("inputs_embeds__packed")
    made.ops.append(reshape("inputs_embeds__flat", [-1, hidden, 1, 1], embeds, flat))
    made.ops.append(change_layout("inputs_embeds__packed", "NCHW", PACKED, flat, stream))
    added, before, deepstack = None, "", iter(decoder.deepstack)
    for layer, attention in zip(decoder.layers, decoder.attentions, strict=True):
        norm = f"{layer}.input_layernorm"
        if added is None:
            (read,) = made.take(decoder.norms[norm], [stream], norm)
        else:
            stream, read = made.take(decoder.norms[norm], [stream, added], before, norm)
        query, key, value = (linear(f"{layer}.self_attn.{name}_proj", read) for name in "qkv")
        heads = [
            decoder.linear[f"{layer}.self_attn.{name}_proj"]["main"]["common"]["outputCount"] // size for name in "qk"
        ]
        main = {"rope_cut_head_dim": size, "num_head": heads[0], "kv_num_head": heads[1], "head_dim": size}
        for kind in ROTARY_NORMS if decoder.head_norms else ():
            name = f"{layer}.self_attn.{kind}"
            main[kind] = _head_norm(decoder.head_norms[name], vectors[f"{name}.weight"])
        points = f"{layer}.self_attn.query", f"{layer}.self_attn.key"
        turned = made.add("RoPE", "RoPEParam", main, [query, key, cosines, sines], *points, form="NHWC")
        context = f"{layer}.self_attn.context"
        (seen,) = made.take(attention, [*turned, value, mask], context, output_c4=True)
        projected = linear(f"{layer}.self_attn.o_proj", seen)
        norm = f"{layer}.post_attention_layernorm"
        stream, read = made.take(decoder.norms[norm], [stream, projected], f"{norm}__sum", norm)
        gate, up = linear(f"{layer}.mlp.gate_proj", read), linear(f"{layer}.mlp.up_proj", read)
        gated = made.binary("MUL_SILU", [up, gate], f"{layer}.mlp__gated")
        added, before = linear(f"{layer}.mlp.down_proj", gated), layer
        if (seen := next(deepstack, None)) is not None:
            # Not by the two inputs of LayerNorm, which must be alike: for text alone the engine feeds one zero.
            total = made.binary("ADD", [stream, added], layer)
            stream, added = made.binary("ADD", [total, made.seen(seen)], f"{names[seen]}__sum"), None
    if added is not None:
        stream = made.binary("ADD", [stream, added], before)
    axis = {"dims": [1], "dataFormat": "NCHW", "dataType": "DT_INT32", "int32s": [0]}
    (first,) = made.add("Const", "Blob", axis, [], "rows_axis", form="NHWC")
    made.ops[-1].pop("inputIndexes")
    rows = decoder.last_rows()
    _, begin, end, _, *rest = rows["inputIndexes"]
    (wanted,) = made.take(rows, [stream, begin, end, first, *rest], "last_rows")
    (last,) = set(decoder.norms) - {f"{layer}.{name}" for layer in decoder.layers for name in NORMS}
    (normed,) = made.take(decoder.norms[last], [wanted], last)
    (packed,) = made.take(decoder.linear[HEAD], [normed], f"{HEAD}__packed")
    outputs = decoder.linear[HEAD]["main"]["common"]["outputCount"]
    plain = made.value(f"{HEAD}__unpacked")
    made.ops.append(change_layout(f"{HEAD}__unpacked", PACKED, "NCHW", packed, plain))
    made.ops.append(reshape(HEAD, [1, -1, outputs], plain, names.index(HEAD)))
    return made.ops


def _needed(ops: list[Op], new: list[Op]) -> list[Op]:
    """What of the old operators the new ones read, in order."""
    makers = {index: op for op in ops for index in op["outputIndexes"]}
    own = {index for op in new for index in op["outputIndexes"]}
    found: set[int] = set()
    left = [index for op in new for index in op.get("inputIndexes", []) if index not in own]
    while left:
        op = makers[left.pop()]
        if id(op) not in found:
            found.add(id(op))
            left += op.get("inputIndexes", [])
    return [op for op in ops if id(op) in found]


def _replaced(dropped: list[Op], decoder: _Decoder) -> bool:
    """Whether all that computes among the operators that fall away is what the new ones do: in each layer two residual
    sums, the rotation of queries and keys, their normalizations and the gate, and what deepstack adds; the rest only
    changes the form of values.
    """
    computing = Counter((op["type"], (op.get("main") or {}).get("opType")) for op in dropped if op["type"] not in FORMS)
    return computing == decoder.replaced


def runs_packed(release: str) -> bool:
    """Whether a release of MNN ("3.6.1") has these operators; an older converter crashes on the rotation."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3]) >= SINCE


def pack_decoder(graph: Graph, vectors: dict[str, np.ndarray]) -> bool:
    """Rewrite a decoder in place; False where it is not of the kind that is understood, and nothing is changed.

    `vectors` are the float32 initializers with one axis of the ONNX graph, by name: the weights of the normalizations
    that become a part of the graph.
    """
    decoder = _Decoder(graph)
    if not decoder.understood:
        return False
    before = list(decoder.names)
    new = _rewrite(decoder, vectors)
    kept = _needed(graph.ops, new)
    taken = [*graph.of_type("Input", "Convolution", "Attention"), *decoder.norms.values()]
    alike = {id(op) for op in [*kept, *taken, decoder.last_rows()]}
    dropped = [op for op in graph.ops if id(op) not in alike]
    if not _replaced(dropped, decoder):
        del graph.content["tensorName"][len(before) :]
        return False
    inputs = graph.of_type("Input")
    graph.content["oplists"] = [*inputs, *(op for op in kept if op["type"] != "Input"), *new]
    _make_names_unique(graph, before)
    return True


def _make_names_unique(graph: Graph, before: list[str]) -> None:
    """A point's old tensor gives its name away to the new one."""
    names = graph.content["tensorName"]
    taken = Counter(names[len(before) :])
    for index in range(len(before)):
        if taken[names[index]]:
            names[index] += "__before"
