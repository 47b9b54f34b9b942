"""Qwen2-VL's vision tower, its data-dependent parts (grids, split attention) taken as inputs: it can be traced."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


def _attend(self: torch.nn.Module, hidden: torch.Tensor, position_embeddings, attention_mask, attention, **_: object):
    """transformers' VisionAttention.forward over all patches at once, a mask in place of the split by picture."""
    patches = hidden.shape[0]
    query, key, value = self.qkv(hidden).reshape(patches, 3, self.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    heads = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)]
    return self.proj(attention(*heads, attention_mask, self.scaling).reshape(patches, -1))


class VisionTower(torch.nn.Module):
    """patches [n, 1176], position_ids int32 [2, n], attention_mask [1, n, n] to image embeddings [n / 4, hidden]."""

    def __init__(self, visual: torch.nn.Module, attention: Callable[..., torch.Tensor]) -> None:
        """`attention(query, key, value, mask, scale)` takes [1, heads, n, head size] and gives [1, n, heads, size]."""
        super().__init__()
        self.visual, self.attention = visual, attention
        for block in visual.blocks:
            block.attn.forward = MethodType(_attend, block.attn)

    def forward(self, patches: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        visual = self.visual
        hidden = visual.patch_embed(patches)
        positions = visual.rotary_pos_emb(hidden, position_ids.transpose(0, 1))
        for block in visual.blocks:
            hidden = block(
                hidden,
                cu_seqlens=None,
                position_embeddings=positions,
                attention_mask=attention_mask,
                attention=self.attention,
            )
        return visual.merger(hidden)
