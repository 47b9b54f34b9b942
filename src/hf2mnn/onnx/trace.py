"""Trace the model of transformers to an ONNX graph, without weights in memory.

Under FakeTensorMode the model has shapes and dtypes and no values; `hf2mnn.onnx.weights` attaches the checkpoint's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_structure, tree_unflatten
from transformers import PreTrainedConfig

from hf2mnn.core.errors import ExportError
from hf2mnn.families import Family, VisionFamily
from hf2mnn.onnx.attention import DECODER_ATTENTION, FULL, VISION_ATTENTION, Cache, expand_attention
from hf2mnn.onnx.repeat import PAST, PRESENT, TRACED, identical_layers, repeat_layers

OPSET = 18
FOLD_LIMIT = 4096  # largest tensor to fold: shapes and scalars are folded, weights are not


class Decoder(torch.nn.Module):
    """Decoder graph with one cache for each layer; `hf2mnn.onnx.export` documents its inputs and outputs."""

    def __init__(self, language_model: torch.nn.Module, lm_head: torch.nn.Module) -> None:
        super().__init__()
        self.language_model, self.lm_head = language_model, lm_head
        language_model.config._attn_implementation = DECODER_ATTENTION

    def forward(self, inputs_embeds, attention_mask, position_ids, logits_index, pasts):
        """Return the logits, and the extended cache of each layer."""
        cache = Cache(pasts)
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
        return self.lm_head(selected), cache.presents


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


def build_fake(config: PreTrainedConfig, family: Family) -> tuple[torch.nn.Module, FakeTensorMode]:
    """Build the model without values, except its rotary tables, which are computed and not stored in checkpoints."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = getattr(transformers, family.architecture)._from_config(config, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            model.set_submodule(name, type(module)(module.config))
    family.prepare(model)
    return model, mode


@_quiet()
def _trace(
    module: torch.nn.Module, mode: FakeTensorMode, inputs: tuple, axes: dict, outputs: list[str], prefixes: tuple
) -> ir.Model:
    """Export a module whose parameters are fakes of `mode`.

    `inputs` are arguments of its forward: tensors and lists of them. `axes` has the name of each tensor, with those of
    its dynamic axes, and `prefixes` the prefix of parameter names in `module` and that in the whole model.
    """
    dynamic = [dict.fromkeys(names, torch.export.Dim.DYNAMIC) for names in axes.values()]
    with mode:
        model = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(axes),
            output_names=outputs,
            dynamic_shapes=tree_unflatten(dynamic, tree_structure(inputs)),
        ).model
    for value in model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    onnxscript.optimizer.optimize_ir(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    for value in model.graph.inputs:
        for axis, name in axes[value.name].items():
            value.shape[axis] = ir.SymbolicDim(name)
    prefix, new_prefix = prefixes
    for name in [name for name in model.graph.initializers if name.startswith(prefix)]:
        model.graph.initializers[name].name = new_prefix + name.removeprefix(prefix)
    return model


def trace_decoder(config: PreTrainedConfig, family: Family, repeat: bool = True) -> ir.Model:
    """Return the decoder graph without deepstack and without values of its initializers; `repeat` copies layers."""
    text = config.get_text_config()
    model, mode = build_fake(config, family)
    language_model = family.language_model(model)
    layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    identical = identical_layers(language_model) if repeat else None
    if identical:
        name, blocks = identical
        language_model.set_submodule(name, torch.nn.ModuleList(blocks[:TRACED]))
    traced = TRACED if identical else layers
    tokens, past = 5, 3
    inputs = (
        torch.zeros(1, tokens, text.hidden_size),
        torch.zeros(1, 1, tokens, past + tokens),
        torch.zeros(family.position_rows, tokens, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        [torch.zeros(2, 1, past, kv_heads, head_dim) for _ in range(traced)],
    )
    axes = {
        "inputs_embeds": {1: "tokens"},
        "attention_mask": {2: "tokens", 3: "past + tokens"},
        "position_ids": {1: "tokens"},
        "logits_index": {},
        **{f"{PAST}{layer}": {2: "past"} for layer in range(traced)},
    }
    outputs = ["logits", *(f"{PRESENT}{layer}" for layer in range(traced))]
    decoder, prefixes = Decoder(language_model, model.lm_head), ("language_model.", f"{family.decoder}.")
    graph = _trace(decoder, mode, inputs, axes, outputs, prefixes)
    if identical and not repeat_layers(graph, f"{family.decoder}.{name}.", layers):
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
    past, joined = (
        ir.val(name, ir.DataType.FLOAT, [layers, 2, 1, tokens, kv_heads, head_dim])
        for name, tokens in [("past_key_values", "past"), ("presents", "past + tokens")]
    )
    first, stacked = graph[0], []

    def insert(op: str, inputs: list[ir.Value], output: ir.Value, **attributes: object) -> ir.Value:
        """Insert a node with the name of its output before the traced ones, and return the output."""
        graph.insert_before(first, ir.node(op, inputs, attributes, outputs=[output], name=output.name))
        return output

    axis = insert("Constant", [], ir.val("cache_axis"), value=ir.tensor(np.array([0])))
    for layer in range(layers):
        layer_past, layer_present = pasts[f"{PAST}{layer}"], presents[f"{PRESENT}{layer}"]
        index = insert("Constant", [], ir.val(f"cache_{layer}/index"), value=ir.tensor(np.array(layer)))
        gathered = ir.val(f"cache_{layer}/past", type=layer_past.type, shape=layer_past.shape)
        layer_past.replace_all_uses_with(insert("Gather", [past, index], gathered, axis=0))
        graph.inputs.remove(layer_past)
        graph.outputs.remove(layer_present)
        stacked.append(ir.val(f"cache_{layer}/present"))
        graph.append(ir.node("Unsqueeze", [layer_present, axis], outputs=stacked[-1:], name=stacked[-1].name))
    graph.append(ir.node("Concat", stacked, {"axis": 0}, outputs=[joined], name=joined.name))
    graph.inputs.append(past)
    graph.outputs.append(joined)


def trace_vision(config: PreTrainedConfig, family: VisionFamily, sample: dict, repeat: bool = True) -> ir.Model:
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
    tower, prefixes = Tower(visual, family, list(sample)), ("visual.", f"{family.vision}.")
    inputs = ([torch.from_numpy(array) for array in sample.values()],)
    graph = _trace(tower, mode, inputs, family.vision_axes, family.vision_outputs, prefixes)
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
