"""Trace transformers' own model into an ONNX graph without any weights in memory.

The model is built under FakeTensorMode: shapes and dtypes are there, values are not. The graph depends on the
configuration alone; `hf2mnn.onnx.weights` then gives each initializer its values from the checkpoint.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf2mnn.core.errors import ExportError
from hf2mnn.families import Family, VisionFamily
from hf2mnn.onnx.attention import FULL, cached_attention, full_attention, write_out_attention
from hf2mnn.onnx.repeat import TRACED, layers_of, repeat_layers, shorten

OPSET = 18
ATTENTION = "hf2mnn_cached"
# What is called flash is given all patches at once by transformers; others get them cut by image or window.
VISION_ATTENTION = "hf2mnn_flash_full"
# Folding stops here: shapes and scalars are folded, weights are left to be read from the checkpoint.
FOLD_LIMIT = 4096
PAST, PRESENT = "past_", "present_"
"""Inputs and outputs of the decoder while it is traced: the cache of each layer."""


class _Cache:
    """Stands where transformers expects a cache: lets keys and values through, and collects what the graph returns."""

    def __init__(self, pasts: list[torch.Tensor]) -> None:
        self.pasts, self.presents = pasts, {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object):
        return key, value

    def get_seq_length(self, *_: object) -> int:
        return self.pasts[0].shape[2]


def _attend(module, query, key, value, attention_mask, scaling, store: _Cache, **_: object):
    past_key, past_value = store.pasts[module.layer_idx]
    context, *present = cached_attention(query, key, value, past_key, past_value, attention_mask, scaling)
    store.presents[module.layer_idx] = torch.stack(present)
    return context, None


def _see(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_: object):
    return full_attention(query, key, value, cu_seq_lens_q, scaling), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
ALL_ATTENTION_FUNCTIONS.register(VISION_ATTENTION, _see)


class Decoder(torch.nn.Module):
    """The graph of the decoder, its cache layer by layer; `hf2mnn.onnx.export` documents its inputs and outputs."""

    def __init__(self, language_model: torch.nn.Module, lm_head: torch.nn.Module) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head
        language_model.config._attn_implementation = ATTENTION

    def forward(self, inputs_embeds, attention_mask, position_ids, logits_index, pasts):
        store = _Cache(pasts)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            # A ready mask: transformers then makes none of its own.
            attention_mask=attention_mask,
            position_ids=position_ids[:, None] if len(position_ids) > 1 else position_ids,
            past_key_values=store,
            use_cache=True,
            store=store,
        ).last_hidden_state
        # hidden[:, logits_index:], with the index a run-time value; torch.export cannot slice by one.
        last, axis = torch.tensor([2**31 - 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
        wanted = torch.onnx.ops.symbolic(
            "Slice", (hidden, logits_index, last, axis), dtype=hidden.dtype, shape=hidden.shape
        )
        return self.lm_head(wanted), [store.presents[layer] for layer in sorted(store.presents)]


class Tower(torch.nn.Module):
    """The graph of the vision tower: float32 [image tokens, hidden], and with deepstack [layers, image tokens, hidden]
    of what is added to the decoder's first layers.
    """

    def __init__(self, visual: torch.nn.Module, family: VisionFamily, names: list[str]) -> None:
        """`names` are those of the inputs, in order."""
        super().__init__()
        self.visual, self.family, self.names = visual, family, names
        visual.config._attn_implementation = VISION_ATTENTION

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        seen = self.visual(**self.family.tower_arguments(dict(zip(self.names, inputs, strict=True))))
        return [seen.pooler_output, *([torch.stack(seen.deepstack_features)] if self.family.deepstack else [])]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about torchvision, training flags and its own internals; none concerns this graph."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def build_fake(config: transformers.PreTrainedConfig, family: Family) -> tuple[torch.nn.Module, FakeTensorMode]:
    """The model without values, but for its rotary tables, which are computed and not stored in checkpoints."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = getattr(transformers, family.architecture)._from_config(config, dtype=torch.float32).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(child.config))
    family.prepare(model)
    return model, mode


def _trace(module: torch.nn.Module, mode: FakeTensorMode, inputs: dict, outputs: list[str], axes: dict) -> ir.Model:
    """`inputs` are (shape, dtype) by name, or a list of such mappings for an argument that is a list."""
    shown: list[Any] = []
    dynamic: list[Any] = []
    named: list[str] = []

    def argument(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
        named.append(name)
        return torch.zeros(shape, dtype=dtype), dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC)

    with _quiet(), mode:
        for name, described in inputs.items():
            if isinstance(described, dict):
                pairs = [argument(inside, *one) for inside, one in described.items()]
                tensor, moving = [tensor for tensor, _ in pairs], [moving for _, moving in pairs]
            else:
                tensor, moving = argument(name, *described)
            shown.append(tensor)
            dynamic.append(moving)
        model = torch.onnx.export(
            module.eval(),
            tuple(shown),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=named,
            output_names=outputs,
            dynamic_shapes=tuple(dynamic),
        ).model
    for value in model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    with _quiet():
        onnxscript.optimizer.optimize_ir(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            value.shape[axis] = ir.SymbolicDim(name)
    return model


def _declare(value: ir.Value, shape: list[int | str]) -> None:
    value.shape = ir.Shape(shape)


def _trace_decoder(config: transformers.PreTrainedConfig, family: Family, repeat: bool) -> ir.Model | None:
    """The decoder with one cache for each layer; None where it cannot be made of a few layers."""
    text = config.get_text_config()
    model, mode = build_fake(config, family)
    part = family.language_model(model)
    layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    found = layers_of(part) if repeat else None
    if repeat and found is None:
        return None
    prefix, traced = f"{family.decoder}.", TRACED if found else layers
    if found:
        shorten(part, *found)
    tokens, past = 5, 3
    pasts = {f"{PAST}{layer}": ((2, 1, past, kv_heads, size), torch.float32) for layer in range(traced)}
    graph = _trace(
        Decoder(part, model.lm_head),
        mode,
        {
            "inputs_embeds": ((1, tokens, text.hidden_size), torch.float32),
            "attention_mask": ((1, 1, tokens, past + tokens), torch.float32),
            "position_ids": ((family.rows, tokens), torch.int32),
            "logits_index": ((1,), torch.int32),
            "pasts": pasts,
        },
        ["logits", *(f"{PRESENT}{layer}" for layer in range(traced))],
        {
            "inputs_embeds": {1: "tokens"},
            "attention_mask": {2: "tokens", 3: "past + tokens"},
            "position_ids": {1: "tokens"},
            **{name: {2: "past"} for name in pasts},
        },
    )
    _name_parameters(graph, "language_model.", prefix)
    if found and not repeat_layers(graph, f"{prefix}{found[0]}.", layers, PAST, PRESENT):
        return None
    return graph


def _join_caches(graph: ir.Graph, layers: int, kv_heads: int, size: int) -> None:
    """`past_key_values` and `presents` in the place of one input and one output for each layer."""
    pasts, presents = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    past = ir.Value(name="past_key_values", shape=ir.Shape([layers, 2, 1, "past", kv_heads, size]))
    past.type, first = ir.TensorType(ir.DataType.FLOAT), graph[0]
    axis = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))}, name="cache_axis")
    axis.outputs[0].name = axis.name
    graph.insert_before(first, axis)
    stacked = []
    for layer in range(layers):
        index = ir.node("Constant", [], {"value": ir.tensor(np.array(layer, np.int64))}, name=f"cache_{layer}/index")
        index.outputs[0].name = index.name
        gather = ir.node("Gather", [past, index.outputs[0]], {"axis": 0}, name=f"cache_{layer}/past")
        one, made = pasts[f"{PAST}{layer}"], presents[f"{PRESENT}{layer}"]
        gather.outputs[0].name, gather.outputs[0].shape, gather.outputs[0].type = gather.name, one.shape, one.type
        one.replace_all_uses_with(gather.outputs[0])
        graph.insert_before(first, [index, gather])
        graph.inputs.remove(one)
        unsqueeze = ir.node("Unsqueeze", [made, axis.outputs[0]], name=f"cache_{layer}/present")
        unsqueeze.outputs[0].name = unsqueeze.name
        graph.outputs.remove(made)
        graph.append(unsqueeze)
        stacked.append(unsqueeze.outputs[0])
    concat = ir.node("Concat", stacked, {"axis": 0}, name="presents")
    joined = concat.outputs[0]
    joined.name, joined.type = "presents", past.type
    _declare(joined, [layers, 2, 1, "past + tokens", kv_heads, size])
    graph.append(concat)
    graph.inputs.append(past)
    graph.outputs.append(joined)


def trace_decoder(config: transformers.PreTrainedConfig, family: Family) -> ir.Model:
    """The decoder's graph, but for what deepstack adds; initializers are named as the parameters of the transformers
    model and have no values.
    """
    graph = _trace_decoder(config, family, repeat=True) or _trace_decoder(config, family, repeat=False)
    text = config.get_text_config()
    layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    _join_caches(graph.graph, layers, kv_heads, size)
    found = write_out_attention(graph)
    if found != layers:
        raise ExportError(
            f"the decoder has {layers} layers but {found} attentions were traced; this is a bug, report it"
        )
    _declare(graph.graph.outputs[0], [1, "rows", text.vocab_size])
    return graph


def _trace_vision(
    config: transformers.PreTrainedConfig, family: VisionFamily, sample: dict, repeat: bool
) -> ir.Model | None:
    model, mode = build_fake(config, family)
    visual = family.tower(model)
    found = layers_of(visual) if repeat else None
    if repeat and found is None:
        return None
    everything = getattr(visual, family.full_attention) if family.full_attention else None
    if found:
        count = len(found[1])
        shorten(visual, *found)
        if everything is not None:
            setattr(visual, family.full_attention, [0])  # so that both masks are in the graph
    inputs = {name: (array.shape, getattr(torch, array.dtype.name)) for name, array in sample.items()}
    graph = _trace(
        Tower(visual, family, list(sample)), mode, {"inputs": inputs}, family.vision_outputs, family.vision_axes()
    )
    _name_parameters(graph, "visual.", f"{family.vision}.")
    if found and not repeat_layers(graph, f"{family.vision}.{found[0]}.", count):
        return None
    if found and everything is not None:
        _choose_masks(graph, everything)
    return graph


def _choose_masks(graph: ir.Model, everything: list[int]) -> None:
    """Of a tower whose first block alone sees all patches: let these blocks do so, and the others not."""
    attentions = [node for node in graph.graph if node.op_type == FULL]
    masks = attentions[0].inputs[-1], attentions[1].inputs[-1]
    for block, attention in enumerate(attentions):
        attention.replace_input_with(len(attention.inputs) - 1, masks[block not in everything])


def trace_vision(config: transformers.PreTrainedConfig, family: VisionFamily, sample: dict) -> ir.Model:
    """The vision graph; `sample` gives the shapes and dtypes of its inputs (numpy arrays by name)."""
    graph = _trace_vision(config, family, sample, repeat=True) if family.blocks_alike else None
    graph = graph or _trace_vision(config, family, sample, repeat=False)
    write_out_attention(graph)
    shape = ["image tokens", config.get_text_config().hidden_size]
    for value, of in zip(graph.graph.outputs, (shape, [family.deepstack, *shape]), strict=False):
        _declare(value, of)
    return graph


def _name_parameters(model: ir.Model, inside: str, outside: str) -> None:
    """Initializers traced through a wrapper get the name that they have in the whole model."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(inside):
            model.graph.initializers.pop(name)
            value.name = outside + name.removeprefix(inside)
            model.graph.initializers[value.name] = value
