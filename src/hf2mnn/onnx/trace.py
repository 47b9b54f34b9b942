"""Trace the model of transformers to an ONNX graph, without weights in memory.

The model is built under FakeTensorMode, which has shapes and dtypes and no values. The graph depends on the
configuration alone; `hf2mnn.onnx.weights` attaches the checkpoint's values to its initializers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
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
from hf2mnn.onnx.attention import FULL, cached_attention, expand_attention, full_attention
from hf2mnn.onnx.repeat import TRACED, identical_layers, repeat_layers

OPSET = 18
DECODER_ATTENTION = "hf2mnn_cached"
# transformers passes all patches to attention functions with "flash" in their names, and splits them for others.
VISION_ATTENTION = "hf2mnn_flash_full"
FOLD_LIMIT = 4096  # largest tensor to fold: shapes and scalars are folded, weights are not
PAST, PRESENT = "past_", "present_"  # prefixes of inputs and outputs of the traced decoder, one for each layer's cache


class _Cache:
    """Cache for transformers that passes keys and values through, and collects the extended ones for graph outputs."""

    def __init__(self, pasts: list[torch.Tensor]) -> None:
        self.pasts, self.presents = pasts, {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object):
        return key, value

    def get_seq_length(self, *_: object) -> int:
        return self.pasts[0].shape[2]


def _decoder_attention(module, query, key, value, attention_mask, scaling, cache: _Cache, **_: object):
    past_key, past_value = cache.pasts[module.layer_idx]
    context, *present = cached_attention(query, key, value, past_key, past_value, attention_mask, scaling)
    cache.presents[module.layer_idx] = torch.stack(present)
    return context, None


def _vision_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_: object):
    # VisionFamily.tower_arguments passes the mask in this argument.
    return full_attention(query, key, value, cu_seq_lens_q, scaling), None


ALL_ATTENTION_FUNCTIONS.register(DECODER_ATTENTION, _decoder_attention)
ALL_ATTENTION_FUNCTIONS.register(VISION_ATTENTION, _vision_attention)


class Decoder(torch.nn.Module):
    """Decoder graph with one cache for each layer; `hf2mnn.onnx.export` documents its inputs and outputs."""

    def __init__(self, language_model: torch.nn.Module, lm_head: torch.nn.Module) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head
        language_model.config._attn_implementation = DECODER_ATTENTION

    def forward(self, inputs_embeds, attention_mask, position_ids, logits_index, pasts):
        """Return the logits, and the extended cache of each layer."""
        cache = _Cache(pasts)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            # transformers passes a mask of four axes to the attention function unchanged.
            attention_mask=attention_mask,
            position_ids=position_ids[:, None] if len(position_ids) > 1 else position_ids,
            past_key_values=cache,
            use_cache=True,
            cache=cache,
        ).last_hidden_state
        # hidden[:, logits_index:], with the index a run-time value, by which torch.export cannot slice.
        end, axis = torch.tensor([2**31 - 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
        selected = torch.onnx.ops.symbolic(
            "Slice", (hidden, logits_index, end, axis), dtype=hidden.dtype, shape=hidden.shape
        )
        return self.lm_head(selected), [cache.presents[layer] for layer in sorted(cache.presents)]


class Tower(torch.nn.Module):
    """Graph of the vision tower, with inputs in the order of `names`; `hf2mnn.onnx.export` documents its outputs."""

    def __init__(self, visual: torch.nn.Module, family: VisionFamily, names: list[str]) -> None:
        super().__init__()
        self.visual, self.family, self.names = visual, family, names
        visual.config._attn_implementation = VISION_ATTENTION

    def forward(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the image embeddings, and with deepstack the stacked features."""
        output = self.visual(**self.family.tower_arguments(dict(zip(self.names, inputs, strict=True))))
        features = [torch.stack(output.deepstack_features)] if self.family.deepstack_layers else []
        return [output.pooler_output, *features]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the exporter about torchvision, training flags and its own internals."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(previous)


def build_fake(config: transformers.PreTrainedConfig, family: Family) -> tuple[torch.nn.Module, FakeTensorMode]:
    """Build the model without values, except its rotary tables, which are computed and not stored in checkpoints."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = getattr(transformers, family.architecture)._from_config(config, dtype=torch.float32).eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RotaryEmbedding"):
                setattr(module, name, type(child)(child.config))
    family.prepare(model)
    return model, mode


def _trace(
    module: torch.nn.Module,
    mode: FakeTensorMode,
    inputs: dict,
    outputs: list[str],
    axes: dict,
    prefixes: tuple[str, str],
) -> ir.Model:
    """Export a module whose parameters are fakes of `mode`.

    `inputs` has the (shape, dtype) of the forward's arguments by name, or a dictionary of these for a list. `axes` has
    the names of their dynamic axes, `prefixes` the prefix of parameter names in `module` and that in the whole model.
    """

    def arguments(make: Callable[[str, tuple], Any]) -> tuple:
        return tuple(
            [make(*item) for item in spec.items()] if isinstance(spec, dict) else make(name, spec)
            for name, spec in inputs.items()
        )

    names = [name for key, spec in inputs.items() for name in (spec if isinstance(spec, dict) else [key])]
    with _quiet(), mode:
        model = torch.onnx.export(
            module.eval(),
            arguments(lambda _, spec: torch.zeros(spec[0], dtype=spec[1])),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=arguments(lambda name, _: dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC)),
        ).model
    for value in model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    with _quiet():
        onnxscript.optimizer.optimize_ir(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            value.shape[axis] = ir.SymbolicDim(name)
    prefix, new_prefix = prefixes
    for name in [name for name in model.graph.initializers if name.startswith(prefix)]:
        value = model.graph.initializers.pop(name)
        value.name = new_prefix + name.removeprefix(prefix)
        model.graph.initializers[value.name] = value
    return model


def trace_decoder(config: transformers.PreTrainedConfig, family: Family, repeat: bool = True) -> ir.Model:
    """Return the decoder graph without deepstack and without values of its initializers; `repeat` copies layers."""
    text = config.get_text_config()
    model, mode = build_fake(config, family)
    language_model, prefix = family.language_model(model), f"{family.decoder}."
    layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    identical = identical_layers(language_model) if repeat else None
    if identical:
        name, blocks = identical
        language_model.set_submodule(name, torch.nn.ModuleList(blocks[:TRACED]))
    traced = TRACED if identical else layers
    tokens, past = 5, 3
    pasts = {f"{PAST}{layer}": ((2, 1, past, kv_heads, head_dim), torch.float32) for layer in range(traced)}
    graph = _trace(
        Decoder(language_model, model.lm_head),
        mode,
        {
            "inputs_embeds": ((1, tokens, text.hidden_size), torch.float32),
            "attention_mask": ((1, 1, tokens, past + tokens), torch.float32),
            "position_ids": ((family.position_rows, tokens), torch.int32),
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
        ("language_model.", prefix),
    )
    if identical and not repeat_layers(graph, f"{prefix}{name}.", layers, PAST, PRESENT):
        return trace_decoder(config, family, repeat=False)
    _join_caches(graph.graph, layers, kv_heads, head_dim)
    attentions = expand_attention(graph)
    if attentions != layers:
        raise ExportError(
            f"the decoder graph has {attentions} attentions and the model {layers} layers; this is a bug, report it"
        )
    graph.graph.outputs[0].shape = ir.Shape([1, "rows", text.vocab_size])
    return graph


def _join_caches(graph: ir.Graph, layers: int, kv_heads: int, head_dim: int) -> None:
    """Replace the cache inputs and outputs of the layers by `past_key_values` and `presents` for all layers."""
    pasts, presents = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))

    def cache(name: str, tokens: str) -> ir.Value:
        shape = ir.Shape([layers, 2, 1, tokens, kv_heads, head_dim])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))

    def constant(value: Any, name: str) -> ir.Node:
        tensor = ir.tensor(np.array(value, np.int64))
        return ir.node("Constant", [], {"value": tensor}, outputs=[ir.Value(name=name)], name=name)

    past, joined = cache("past_key_values", "past"), cache("presents", "past + tokens")
    first, axis = graph[0], constant([0], "cache_axis")
    graph.insert_before(first, axis)
    stacked = []
    for layer in range(layers):
        layer_past, layer_present = pasts[f"{PAST}{layer}"], presents[f"{PRESENT}{layer}"]
        index = constant(layer, f"cache_{layer}/index")
        gathered = ir.Value(name=f"cache_{layer}/past", shape=layer_past.shape, type=layer_past.type)
        gather = ir.node("Gather", [past, *index.outputs], {"axis": 0}, outputs=[gathered], name=gathered.name)
        layer_past.replace_all_uses_with(gathered)
        graph.insert_before(first, [index, gather])
        graph.inputs.remove(layer_past)
        stacked.append(ir.Value(name=f"cache_{layer}/present"))
        graph.outputs.remove(layer_present)
        graph.append(
            ir.node("Unsqueeze", [layer_present, *axis.outputs], outputs=stacked[-1:], name=f"cache_{layer}/present")
        )
    graph.append(ir.node("Concat", stacked, {"axis": 0}, outputs=[joined], name="presents"))
    graph.inputs.append(past)
    graph.outputs.append(joined)


def trace_vision(
    config: transformers.PreTrainedConfig, family: VisionFamily, sample: dict, repeat: bool = True
) -> ir.Model:
    """Return the vision graph; `sample` has arrays with the shapes and dtypes of its inputs; `repeat` copies blocks."""
    model, mode = build_fake(config, family)
    visual = model.get_submodule(family.vision)
    identical = identical_layers(visual) if repeat and family.identical_blocks else None
    full_blocks = getattr(visual, family.full_attention_blocks) if family.full_attention_blocks else None
    if identical:
        name, blocks = identical
        visual.set_submodule(name, torch.nn.ModuleList(blocks[:TRACED]))
        if full_blocks is not None:
            setattr(visual, family.full_attention_blocks, [0])  # so that the graph uses both masks
    inputs = {name: (array.shape, getattr(torch, array.dtype.name)) for name, array in sample.items()}
    tower, prefixes = Tower(visual, family, list(sample)), ("visual.", f"{family.vision}.")
    graph = _trace(tower, mode, {"inputs": inputs}, family.vision_outputs, family.vision_axes, prefixes)
    if identical and not repeat_layers(graph, f"{family.vision}.{name}.", len(blocks)):
        return trace_vision(config, family, sample, repeat=False)
    if identical and full_blocks is not None:
        # Full attention has the mask that only block 0 has in the traced graph, all other blocks the window mask.
        attentions = [node for node in graph.graph if node.op_type == FULL]
        masks = attentions[0].inputs[-1], attentions[1].inputs[-1]
        for block, attention in enumerate(attentions):
            attention.replace_input_with(len(attention.inputs) - 1, masks[block not in full_blocks])
    expand_attention(graph)
    shape = ["image tokens", config.get_text_config().hidden_size]
    for value, output_shape in zip(graph.graph.outputs, (shape, [family.deepstack_layers, *shape]), strict=False):
        value.shape = ir.Shape(output_shape)
    return graph
