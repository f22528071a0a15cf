"""Attention of every token of a set over the tokens of that set."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import masked_softmax, widen

FUSED_FROM = 256
"""Sets of more tokens go through the fused kernel, whose memory does not grow with the square of their number. It
has no rule for torch.vmap on the CPU (members are then taken one by one), and flop counters do not see into it."""


def masked_self_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """``softmax(Q K^T / sqrt(head_dim)) V`` over the real keys; what padding asks for is of no meaning."""
    if query.shape[-2] > FUSED_FROM:
        keep = None if mask is None else mask[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keep)
    scores = (widen(query) * query.shape[-1] ** -0.5) @ widen(key).transpose(-1, -2)
    return masked_softmax(scores, mask).to(value.dtype) @ value
