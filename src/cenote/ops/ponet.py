"""The three poolings of PoNet and how a gate joins them, as functions of projected tokens.

Source: "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences" (arXiv 2110.02442).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.query_attention import attend, fold_key_projection, own_channels, project_pooled, spread_heads
from cenote.ops.segments import segment_max


class GlobalPool(NamedTuple):
    """What one query a head reads from the whole sequence.

    Attributes:
        vector: the heads side by side, ``(batch, dim)``.
        weights: share of each token, ``(batch, heads, tokens)``.
    """

    vector: Tensor
    weights: Tensor


def global_aggregation(
    query: Float[Tensor, "batch dim"],
    tokens: Float[Tensor, "batch tokens dim"],
    num_heads: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    key_weight: Float[Tensor, "dim dim"] | None = None,
    key_bias: Float[Tensor, "dim"] | None = None,
) -> GlobalPool:
    """Attention of one query a head whose keys are its values too: ``sum_n softmax_n(g K_n / sqrt(head_dim)) K_n``.

    With a key map the tokens are read as they are and what a head pooled is projected, ``K_n = W x_n + b`` only in
    effect: ``O(N dim heads)`` in place of ``O(N dim^2)``.

    Args:
        query: mean of the projected queries, heads side by side.
        tokens: the keys themselves, or what ``key_weight`` and ``key_bias`` make keys of.
        mask: real tokens.
    """
    heads = query.unflatten(-1, (num_heads, -1)) * (query.shape[-1] // num_heads) ** -0.5
    if key_weight is None:
        pooled, weights, _ = attend(spread_heads(heads), tokens, tokens, mask)
        return GlobalPool(own_channels(pooled), weights)
    # The key bias adds the same to every score of a head, so the softmax does not see it.
    pooled, weights, _ = attend(fold_key_projection(heads, key_weight), tokens, tokens, mask)
    return GlobalPool(project_pooled(pooled, key_weight, key_bias), weights)


def segment_pool(
    values: Float[Tensor, "batch tokens dim"],
    segment_ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    guarded: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """:func:`~cenote.ops.segments.segment_max`, and 0 at ``guarded`` tokens."""
    pooled = segment_max(values, segment_ids, mask)
    return pooled if guarded is None else pooled.masked_fill(guarded[..., None], 0.0)


def local_pool(
    values: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    guarded: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Maximum of a token and its two neighbours, ``max(v_{n-1}, v_n, v_{n+1})``, and 0 at padding and guarded tokens,
    which are no one's neighbour."""
    hidden = guarded if mask is None else ~mask if guarded is None else ~mask | guarded
    if hidden is not None:
        values = values.masked_fill(hidden[..., None], float("-inf"))
    # Maxima of all pairs, then of all pairs of pairs: an end sees the -inf beyond it.
    beyond = F.pad(values, (0, 0, 1, 1), value=float("-inf"))
    pairs = torch.maximum(beyond[:, :-1], beyond[:, 1:])
    pooled = torch.maximum(pairs[:, :-1], pairs[:, 1:])
    # Also at padding: an -inf there would be NaN in the gradient of any map behind.
    return pooled if hidden is None else pooled.masked_fill(hidden[..., None], 0.0)


def fuse_pools(
    gate: Float[Tensor, "batch tokens dim"] | None,
    overall: Float[Tensor, "batch dim"] | None = None,
    segment: Float[Tensor, "batch tokens dim"] | None = None,
    local: Float[Tensor, "batch tokens dim"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """``(overall + segment) * gate + local``; a pooling that is left out counts as 0.

    Raises:
        ValueError: no pooling at all, or a gate missing where there is something to gate.
    """
    wide = None if overall is None else overall[:, None]
    gated = wide if segment is None else segment if wide is None else segment + wide
    if gated is None and local is None:
        raise ValueError("there is nothing to fuse: give at least one pooling")
    if gated is None:
        assert local is not None
        return local
    if gate is None:
        raise ValueError("the global and the segment pooling need a gate")
    return gated * gate if local is None else torch.addcmul(local, gated, gate)
