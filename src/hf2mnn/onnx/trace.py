"""Trace the model of transformers to an ONNX graph, without weights in memory.

The model is built under FakeTensorMode, which has shapes and dtypes and no values. The graph depends on the
configuration alone; `hf2mnn.onnx.weights` attaches the checkpoint's values to its initializers.
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
from hf2mnn.onnx.attention import FULL, cached_attention, expand_attention, full_attention
from hf2mnn.onnx.repeat import TRACED, identical_layers, keep_traced_layers, repeat_layers

OPSET = 18
DECODER_ATTENTION = "hf2mnn_cached"
# transformers passes all patches to attention functions with "flash" in their names, and splits them for others.
VISION_ATTENTION = "hf2mnn_flash_full"
# Largest tensor to fold: shapes and scalars are folded, weights are not.
FOLD_LIMIT = 4096
PAST, PRESENT = "past_", "present_"
"""Prefixes of the decoder's inputs and outputs while it is traced: one for the cache of each layer."""


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
    """Graph of the vision tower; `hf2mnn.onnx.export` documents its outputs."""

    def __init__(self, visual: torch.nn.Module, family: VisionFamily, names: list[str]) -> None:
        """Wrap the tower; `names` are the names of the inputs, in order."""
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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


def _trace(module: torch.nn.Module, mode: FakeTensorMode, inputs: dict, outputs: list[str], axes: dict) -> ir.Model:
    """Export a module.

    Args:
        module: Module with fake parameters.
        mode: Their mode.
        inputs: (shape, dtype) of the forward's arguments by name; a dictionary of these for an argument that is a list.
        outputs: Names of the graph's outputs.
        axes: Names of the dynamic axes by graph input.
    """
    arguments: list[Any] = []
    dynamic_shapes: list[Any] = []
    names: list[str] = []

    def add_input(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict]:
        names.append(name)
        return torch.zeros(shape, dtype=dtype), dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC)

    with _quiet(), mode:
        for name, spec in inputs.items():
            if isinstance(spec, dict):
                pairs = [add_input(key, *item) for key, item in spec.items()]
                argument, dynamic = [tensor for tensor, _ in pairs], [shape for _, shape in pairs]
            else:
                argument, dynamic = add_input(name, *spec)
            arguments.append(argument)
            dynamic_shapes.append(dynamic)
        model = torch.onnx.export(
            module.eval(),
            tuple(arguments),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=tuple(dynamic_shapes),
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


def _head_dim(text: transformers.PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _trace_decoder(config: transformers.PreTrainedConfig, family: Family, repeat: bool) -> ir.Model | None:
    """Trace the decoder with one cache for each layer.

    Args:
        config: Configuration of the model.
        family: Family of the model.
        repeat: Trace three layers and copy them; return None if the layers differ.
    """
    text = config.get_text_config()
    model, mode = build_fake(config, family)
    language_model = family.language_model(model)
    layers, kv_heads, head_dim = text.num_hidden_layers, text.num_key_value_heads, _head_dim(text)
    identical = identical_layers(language_model) if repeat else None
    if repeat and identical is None:
        return None
    prefix, traced = f"{family.decoder}.", TRACED if identical else layers
    if identical:
        keep_traced_layers(language_model, *identical)
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
    )
    _rename_parameters(graph, "language_model.", prefix)
    if identical and not repeat_layers(graph, f"{prefix}{identical[0]}.", layers, PAST, PRESENT):
        return None
    return graph


def _join_caches(graph: ir.Graph, layers: int, kv_heads: int, head_dim: int) -> None:
    """Replace the cache inputs and outputs of the layers by `past_key_values` and `presents` for all layers."""
    pasts, presents = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    past = ir.Value(name="past_key_values", shape=ir.Shape([layers, 2, 1, "past", kv_heads, head_dim]))
    past.type, first = ir.TensorType(ir.DataType.FLOAT), graph[0]
    axis = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))}, name="cache_axis")
    axis.outputs[0].name = axis.name
    graph.insert_before(first, axis)
    stacked = []
    for layer in range(layers):
        index = ir.node("Constant", [], {"value": ir.tensor(np.array(layer, np.int64))}, name=f"cache_{layer}/index")
        index.outputs[0].name = index.name
        gather = ir.node("Gather", [past, index.outputs[0]], {"axis": 0}, name=f"cache_{layer}/past")
        layer_past, layer_present = pasts[f"{PAST}{layer}"], presents[f"{PRESENT}{layer}"]
        gathered = gather.outputs[0]
        gathered.name, gathered.shape, gathered.type = gather.name, layer_past.shape, layer_past.type
        layer_past.replace_all_uses_with(gathered)
        graph.insert_before(first, [index, gather])
        graph.inputs.remove(layer_past)
        unsqueeze = ir.node("Unsqueeze", [layer_present, axis.outputs[0]], name=f"cache_{layer}/present")
        unsqueeze.outputs[0].name = unsqueeze.name
        graph.outputs.remove(layer_present)
        graph.append(unsqueeze)
        stacked.append(unsqueeze.outputs[0])
    concat = ir.node("Concat", stacked, {"axis": 0}, name="presents")
    joined = concat.outputs[0]
    joined.name, joined.type = "presents", past.type
    joined.shape = ir.Shape([layers, 2, 1, "past + tokens", kv_heads, head_dim])
    graph.append(concat)
    graph.inputs.append(past)
    graph.outputs.append(joined)


def trace_decoder(config: transformers.PreTrainedConfig, family: Family) -> ir.Model:
    """Return the decoder graph without deepstack.

    Its initializers have the names of the transformers model's parameters and no values.

    Raises:
        ExportError: The graph has another number of attentions than the model has layers.
    """
    model = _trace_decoder(config, family, repeat=True) or _trace_decoder(config, family, repeat=False)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    _join_caches(model.graph, layers, text.num_key_value_heads, _head_dim(text))
    attentions = expand_attention(model)
    if attentions != layers:
        raise ExportError(
            f"the decoder graph has {attentions} attentions and the model {layers} layers; this is a bug, report it"
        )
    model.graph.outputs[0].shape = ir.Shape([1, "rows", text.vocab_size])
    return model


def _trace_vision(
    config: transformers.PreTrainedConfig, family: VisionFamily, sample: dict, repeat: bool
) -> ir.Model | None:
    """Trace the vision tower; with `repeat`, trace three blocks and copy them, and return None if the blocks differ."""
    model, mode = build_fake(config, family)
    visual = family.tower(model)
    identical = identical_layers(visual) if repeat else None
    if repeat and identical is None:
        return None
    full_blocks = getattr(visual, family.full_attention_blocks) if family.full_attention_blocks else None
    if identical:
        count = len(identical[1])
        keep_traced_layers(visual, *identical)
        if full_blocks is not None:
            setattr(visual, family.full_attention_blocks, [0])  # so that the graph uses both masks
    inputs = {name: (array.shape, getattr(torch, array.dtype.name)) for name, array in sample.items()}
    tower = Tower(visual, family, list(sample))
    graph = _trace(tower, mode, {"inputs": inputs}, family.vision_outputs, family.vision_axes())
    _rename_parameters(graph, "visual.", f"{family.vision}.")
    if identical and not repeat_layers(graph, f"{family.vision}.{identical[0]}.", count):
        return None
    if identical and full_blocks is not None:
        _assign_masks(graph, full_blocks)
    return graph


def _assign_masks(graph: ir.Model, full_blocks: list[int]) -> None:
    """Give `full_blocks` the mask of full attention, which only block 0 has, and all others the window mask."""
    attentions = [node for node in graph.graph if node.op_type == FULL]
    masks = attentions[0].inputs[-1], attentions[1].inputs[-1]
    for block, attention in enumerate(attentions):
        attention.replace_input_with(len(attention.inputs) - 1, masks[block not in full_blocks])


def trace_vision(config: transformers.PreTrainedConfig, family: VisionFamily, sample: dict) -> ir.Model:
    """Return the vision graph; `sample` are arrays with the shapes and dtypes of its inputs, by name."""
    model = _trace_vision(config, family, sample, repeat=True) if family.identical_blocks else None
    model = model or _trace_vision(config, family, sample, repeat=False)
    expand_attention(model)
    shape = ["image tokens", config.get_text_config().hidden_size]
    shapes = (shape, [family.deepstack_layers, *shape])
    for value, output_shape in zip(model.graph.outputs, shapes, strict=False):
        value.shape = ir.Shape(output_shape)
    return model


def _rename_parameters(model: ir.Model, prefix: str, new_prefix: str) -> None:
    """Rename initializers from their names in a wrapper to those in the whole model."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(prefix):
            model.graph.initializers.pop(name)
            value.name = new_prefix + name.removeprefix(prefix)
            model.graph.initializers[value.name] = value
