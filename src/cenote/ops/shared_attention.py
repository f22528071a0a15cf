"""Attention in two halves, so that one layer's map can be applied to another layer's values."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import widen

FORMS = ("probabilities", "query_key")
"""What one layer can hand to another: its map, or the queries and keys that it is made of."""


def attention_map(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "masked 1 queries keys"] | Float[Tensor, "masked #heads queries keys"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """``softmax(query key^T * scale)`` with grouped keys, which are not repeated. The softmax runs in float32 at
    least.

    Args:
        mask: ``True`` where a query sees a key, or what is added to the logits; ``None`` for everything visible. A row
            that sees nothing is uniform, never NaN.
        scale: factor on the logits, by default ``head_dim ** -0.5``.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    logits = (grouped @ key.transpose(-1, -2)).view(batch, heads, queries, keys)
    logits = widen(logits) * (head_dim**-0.5 if scale is None else scale)
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + mask
    return logits.softmax(dim=-1).to(query.dtype)


def apply_map(
    weights: Float[Tensor, "batch heads queries keys"], value: Float[Tensor, "batch kv_heads keys head_dim"]
) -> Float[Tensor, "batch heads queries head_dim"]:
    """``weights @ value``, each value head serving its group of query heads without being repeated."""
    batch, heads, queries, keys = weights.shape
    grouped = weights.reshape(batch, value.shape[1], -1, keys)
    return (grouped @ value).view(batch, heads, queries, -1)
