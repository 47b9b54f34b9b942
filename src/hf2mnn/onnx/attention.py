"""Attention as one opaque node while tracing, expanded to standard operators after the graph is optimized.

MNN's converter fuses attention into an operator with a KV cache of the engine only if it matches one exact chain of
operators (`FuseAttention.cpp` and `RemovePastKeyValue` of MNN 3.6.1):

    Reshape(Transpose(MatMul(Softmax(Add(Mul(MatMul(Transpose(q), K), scale), mask)), V)))
    K = [Reshape(Expand(Unsqueeze(] Transpose(Concat(past_k, k, axis=1), 0 2 3 1) [)))]
    V = [Reshape(Expand(Unsqueeze(] Transpose(Concat(past_v, v, axis=1), 0 2 1 3) [)))]

q, k and v are [batch, tokens, heads, head_dim]. The operators in brackets are for grouped-query attention. An optimizer
would remove the two transposes of q, which cancel out, so the chain is added after optimization.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DOMAIN = "hf2mnn"
CACHED, FULL = "CachedAttention", "FullAttention"
DECODER_ATTENTION = "hf2mnn_cached"
# transformers passes all patches to attention functions with "flash" in their names, and splits them for others.
VISION_ATTENTION = "hf2mnn_flash_full"


class Cache:
    """Cache for transformers that passes keys and values through, and collects the extended ones for graph outputs."""

    def __init__(self, pasts: list[torch.Tensor]) -> None:
        self.pasts, self.presents = pasts, []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object):
        """Return the arguments: `_cached_attention` appends them."""
        return key, value

    def get_seq_length(self, *_: object) -> int:
        """Return the number of cached tokens."""
        return self.pasts[0].shape[2]


def _cached_attention(module, query, key, value, attention_mask, scaling, cache: Cache, **_: object):
    """Attention with a KV cache as one node.

    Queries are [1, heads, s, d], keys and values [1, kv heads, s, d], cached ones [1, p, kv heads, d], the mask, which
    is added to the scores, [1, 1, s, p + s], and the context [1, s, heads, d].
    """
    past_key, past_value = cache.pasts[module.layer_idx]
    batch, heads, tokens, size = query.shape
    present = [batch, past_key.shape[1] + tokens, key.shape[1], size]
    context, *extended = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{CACHED}",
        (query, key, value, past_key, past_value, attention_mask),
        {"scale": scaling},
        dtypes=(query.dtype,) * 3,
        shapes=([batch, tokens, heads, size], present, present),
        version=1,
    )
    cache.presents.append(torch.stack(extended))
    return context, None


def _full_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_: object):
    """Attention without a cache as one node, with the mask of `VisionFamily.tower_arguments` in `cu_seq_lens_q`.

    The inputs are [1, heads, n, d], the mask added to the scores [1, n, n], and the context [1, n, heads, d].
    """
    batch, heads, tokens, size = query.shape
    context = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{FULL}",
        (query, key, value, cu_seq_lens_q),
        {"scale": scaling},
        dtype=query.dtype,
        shape=[batch, tokens, heads, size],
        version=1,
    )
    return context, None


ALL_ATTENTION_FUNCTIONS.register(DECODER_ATTENTION, _cached_attention)
ALL_ATTENTION_FUNCTIONS.register(VISION_ATTENTION, _full_attention)


class _Chain:
    """Builder of a chain of nodes whose names begin with the name of their attention."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, []

    def __call__(self, op: str, *inputs: ir.Value, name: str, **attributes: object) -> ir.Value:
        name = f"{self.name}/{name}"
        # A constant's type is that of its tensor.
        output = ir.val(name, ir.DataType.FLOAT if inputs else None)
        self.nodes.append(ir.node(op, inputs, attributes, outputs=[output], name=name))
        return output

    def constant(self, value: list[int] | np.ndarray, name: str) -> ir.Value:
        return self("Constant", name=name, value=ir.tensor(np.asarray(value), name=f"{self.name}/{name}"))

    def expand_heads(self, value: ir.Value, group: int, shape: list[int], name: str) -> ir.Value:
        """Repeat each key-value head for its group of query heads."""
        axis = self.constant([2], f"{name}_axis")
        grouped = self("Unsqueeze", value, axis, name=f"{name}_grouped")
        times = self.constant([1, 1, group, 1, 1], f"{name}_times")
        repeated = self("Expand", grouped, times, name=f"{name}_repeated")
        return self("Reshape", repeated, self.constant(shape, f"{name}_shape"), name=f"{name}_per_query_head")


def _expand_node(node: ir.Node, name: str) -> list[ir.Node]:
    chain = _Chain(name)
    query, key, value, *rest = node.inputs
    heads, head_dim, kv_heads = int(query.shape[1]), int(query.shape[3]), int(key.shape[1])
    swap = (0, 2, 1, 3)
    # The engine's operator takes [batch, tokens, heads, head_dim]; MNN matches the Transpose after it.
    query = chain("Transpose", query, name="query", perm=swap)
    key = chain("Transpose", key, name="key", perm=swap)
    value = chain("Transpose", value, name="value", perm=swap)
    presents = []
    if node.op_type == CACHED:
        key = chain("Concat", rest[0], key, name="present_key", axis=1)
        value = chain("Concat", rest[1], value, name="present_value", axis=1)
        presents = [key, value]
    query = chain("Transpose", query, name="query_heads", perm=swap)
    key = chain("Transpose", key, name="key_heads", perm=(0, 2, 3, 1))
    value = chain("Transpose", value, name="value_heads", perm=swap)
    if heads > kv_heads:
        key = chain.expand_heads(key, heads // kv_heads, [1, heads, head_dim, -1], "key")
        value = chain.expand_heads(value, heads // kv_heads, [1, heads, -1, head_dim], "value")
    scores = chain("MatMul", query, key, name="scores")
    scale = chain.constant(np.float32(node.attributes["scale"].as_float()), "scale")
    scores = chain("Mul", scores, scale, name="scaled")
    scores = chain("Add", scores, rest[-1], name="masked")
    weights = chain("Softmax", scores, name="weights", axis=-1)
    context = chain("MatMul", weights, value, name="context_heads")
    context = chain("Transpose", context, name="context", perm=swap)
    for old, new in zip(node.outputs, [context, *presents], strict=True):
        new.shape = old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    return chain.nodes


def expand_attention(model: ir.Model) -> int:
    """Replace every opaque attention node by standard operators, and return their number."""
    opaque = [node for node in model.graph if node.domain == DOMAIN]
    for layer, node in enumerate(opaque):
        model.graph.insert_before(node, _expand_node(node, f"attention_{layer}"))
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    return len(opaque)
