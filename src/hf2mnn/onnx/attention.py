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

DOMAIN = "hf2mnn"
CACHED = "CachedAttention"
FULL = "FullAttention"


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention with a KV cache, as a symbolic node for tracing.

    Args:
        query: [1, heads, s, d].
        key: [1, kv heads, s, d].
        value: [1, kv heads, s, d].
        past_key: Cached keys [1, p, kv heads, d].
        past_value: Cached values [1, p, kv heads, d].
        mask: [1, 1, s, p + s], added to the scores.
        scale: Factor of the scores.

    Returns:
        Context [1, s, heads, d], and the extended keys and values, [1, p + s, kv heads, d] each.
    """
    batch, heads, tokens, size = query.shape
    present = [batch, past_key.shape[1] + tokens, key.shape[1], size]
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{CACHED}",
        (query, key, value, past_key, past_value, mask),
        {"scale": scale},
        dtypes=(query.dtype,) * 3,
        shapes=([batch, tokens, heads, size], present, present),
        version=1,
    )


def full_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention without a cache, as a symbolic node for tracing.

    Args:
        query: [1, heads, n, d].
        key: [1, heads, n, d].
        value: [1, heads, n, d].
        mask: [1, n, n], added to the scores.
        scale: Factor of the scores.

    Returns:
        Context [1, n, heads, d].
    """
    batch, heads, tokens, size = query.shape
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{FULL}",
        (query, key, value, mask),
        {"scale": scale},
        dtype=query.dtype,
        shape=[batch, tokens, heads, size],
        version=1,
    )


class _Chain:
    """Builder of a chain of nodes whose names begin with the name of their attention."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, []

    def __call__(self, op: str, *inputs: ir.Value, name: str, **attributes: object) -> ir.Value:
        node = ir.node(op, list(inputs), attributes or None, name=f"{self.name}/{name}")
        node.outputs[0].name = f"{self.name}/{name}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: np.ndarray, name: str) -> ir.Value:
        node = ir.node(
            "Constant", [], {"value": ir.tensor(value, name=f"{self.name}/{name}")}, name=f"{self.name}/{name}"
        )
        node.outputs[0].name = f"{self.name}/{name}"
        self.nodes.append(node)
        return node.outputs[0]


def _expand_heads(chain: _Chain, value: ir.Value, heads: int, kv_heads: int, shape: list[int], name: str) -> ir.Value:
    """Repeat each key-value head for its group of query heads."""
    if heads == kv_heads:
        return value
    group = heads // kv_heads
    axis = chain.constant(np.array([2], np.int64), f"{name}_axis")
    grouped = chain("Unsqueeze", value, axis, name=f"{name}_grouped")
    times = chain.constant(np.array([1, 1, group, 1, 1], np.int64), f"{name}_times")
    repeated = chain("Expand", grouped, times, name=f"{name}_repeated")
    return chain(
        "Reshape", repeated, chain.constant(np.array(shape, np.int64), f"{name}_shape"), name=f"{name}_per_query_head"
    )


def _dimensions(value: ir.Value) -> tuple[int, int]:
    """Return heads and head_dim of a value [1, heads, tokens, head_dim]."""
    return int(value.shape[1]), int(value.shape[3])


def _expand_node(node: ir.Node, name: str) -> list[ir.Node]:
    chain = _Chain(name)
    query, key, value, *rest = node.inputs
    heads, head_dim = _dimensions(query)
    kv_heads, _ = _dimensions(key)
    swap = (0, 2, 1, 3)
    # The engine's operator takes [batch, tokens, heads, head_dim]; MNN matches the Transpose after it.
    query = chain("Transpose", query, name="query", perm=swap)
    key = chain("Transpose", key, name="key", perm=swap)
    value = chain("Transpose", value, name="value", perm=swap)
    mask = rest[-1]
    if node.op_type == CACHED:
        past_key, past_value = rest[:2]
        key = chain("Concat", past_key, key, name="present_key", axis=1)
        value = chain("Concat", past_value, value, name="present_value", axis=1)
    presents = [key, value]
    query = chain("Transpose", query, name="query_heads", perm=swap)
    key = chain("Transpose", key, name="key_heads", perm=(0, 2, 3, 1))
    value = chain("Transpose", value, name="value_heads", perm=swap)
    key = _expand_heads(chain, key, heads, kv_heads, [1, heads, head_dim, -1], "key")
    value = _expand_heads(chain, value, heads, kv_heads, [1, heads, -1, head_dim], "value")
    scores = chain("MatMul", query, key, name="scores")
    scale = chain.constant(np.array(node.attributes["scale"].as_float(), np.float32), "scale")
    scores = chain("Mul", scores, scale, name="scaled")
    scores = chain("Add", scores, mask, name="masked")
    weights = chain("Softmax", scores, name="weights", axis=-1)
    context = chain("MatMul", weights, value, name="context_heads")
    context = chain("Transpose", context, name="context", perm=swap)
    outputs = [context, *presents] if node.op_type == CACHED else [context]
    for old, new in zip(node.outputs, outputs, strict=True):
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
