"""Projections and rotary positions of the attention modules of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cenote.ops.masked import widen

Rotary = tuple[Tensor, Tensor]
Projected = tuple[Tensor, Tensor, Tensor]


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate pairs of channels of ``(batch, tokens, heads, head_dim)`` by tables of ``(tokens, head_dim)``."""
    if rotary is None:
        return x
    cos, sin = (table.to(x.device) for table in rotary)
    if cos.ndim == 2:
        cos, sin = cos[None, :, None], sin[None, :, None]
    even, odd = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    first = even * cos[..., 0::2] - odd * sin[..., 0::2]
    second = odd * cos[..., 1::2] + even * sin[..., 1::2]
    return torch.stack([first, second], dim=-1).flatten(-2).type_as(x)


def rotate_part(x: Tensor, rotary: Rotary | None, start: int, stop: int) -> Tensor:
    """Rotate the tokens from ``start`` to ``stop``."""
    if rotary is None:
        return x
    return torch.cat([x[:, :start], rotate(x[:, start:stop], rotary), x[:, stop:]], dim=1)


def query_key_value(attn: Any, x: Tensor) -> Projected:
    """The three projections, fused or not."""
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def by_head(attn: Any, parts: Projected) -> Projected:
    """By head, queries and keys normalised inside each."""
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in parts)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def text_projections(attn: Any, text: Tensor) -> Projected:
    """The text's own projections of a dual-stream block."""
    if getattr(attn, "fused_projections", False) and hasattr(attn, "to_added_qkv"):
        parts = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        parts = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in parts)
    query = query if attn.norm_added_q is None else attn.norm_added_q(query)
    key = key if attn.norm_added_k is None else attn.norm_added_k(key)
    return query, key, value


def project_out(attn: Any, x: Tensor) -> Tensor:
    """Output projection and dropout; blocks that project later have none."""
    layers = getattr(attn, "to_out", None)
    return x if layers is None else layers[1](layers[0](x))


def text_out(attn: Any, x: Tensor) -> Tensor:
    """The text's own output projection of a dual-stream block."""
    layer = getattr(attn, "to_add_out", None)
    return x if layer is None else layer(x)
