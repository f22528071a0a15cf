"""Attention of a few queries over many tokens, pooled first and projected after.

A cross-attention that reads tokens ``x`` with queries ``q`` costs ``2 N D^2`` when keys ``W_k x`` and values ``W_v x``
are formed per token. The same numbers come from moving the key projection into the query,
``q^T W_k x = (W_k^T q)^T x``, and the value projection behind the sum, ``sum_n a_n W_v x_n = W_v sum_n a_n x_n``:
``2 N Q D + 2 D^2`` instead. Biases follow from ``sum_n a_n = 1``: a key bias cancels in the softmax, a value bias is
added once. The affine part of a norm before the projections folds the same way, so keys and values depend on no
parameter at all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import masked_softmax, widen


class Read(NamedTuple):
    """What the queries read.

    Attributes:
        pooled: ``sum_n a[q, n] values[n]``, ``(batch, queries, dim)``.
        weights: attention over the tokens, ``(batch, queries, tokens)``.
        extra: attention on the extra keys, ``(batch, queries, extras)``, or ``None``.
    """

    pooled: Tensor
    weights: Tensor
    extra: Tensor | None = None


def attend(
    queries: Float[Tensor, "*b queries dim"],
    keys: Float[Tensor, "batch tokens dim"],
    values: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    bias: Float[Tensor, "*c queries tokens"] | None = None,
    extra: Float[Tensor, "*e queries extras"] | None = None,
) -> Read:
    """Softmax attention of effective queries over tokens.

    ``a = softmax(queries keys^T + bias)``, ``pooled = a values``. Scaling belongs in ``queries``.

    Args:
        queries: ``(queries, dim)`` shared by the batch or ``(batch, queries, dim)``.
        keys: ``(batch, tokens, dim)``.
        values: ``(batch, tokens, width)``.
        mask: real tokens.
        bias: added to the scores, ``(queries, tokens)`` or ``(batch, queries, tokens)``.
        extra: scores of further keys that are not in ``keys`` (a class token, say); they take part in the softmax and
            their weights come back in :attr:`Read.extra`. ``(queries, extras)`` or ``(batch, queries, extras)``.
    """
    # One batched product also for shared queries: folding the batch into rows makes a tall thin product, which is
    # slower.
    scores = torch.bmm(queries.expand(keys.shape[0], -1, -1), keys.transpose(1, 2))
    if bias is not None:
        scores = scores + bias
    if extra is None:
        weights = masked_softmax(scores, mask)
        return Read(torch.bmm(weights.to(values.dtype), values), weights)
    batch, _, tokens = scores.shape
    extra = extra.expand(batch, -1, -1)
    joint = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(batch, extra.shape[-1])], dim=1)
    weights = masked_softmax(joint, mask)
    on_tokens, on_extra = weights[..., :tokens], weights[..., tokens:]
    return Read(torch.bmm(on_tokens.to(values.dtype), values), on_tokens, on_extra)


def fold_key_projection(
    queries: Float[Tensor, "*batch heads head_dim"], key_weight: Float[Tensor, "inner dim"]
) -> Float[Tensor, "*batch heads dim"]:
    """Move the key projection into the queries: ``W_k,h^T q_h`` per head, heads being consecutive rows of ``W_k``.

    A ``W_k`` of ``head_dim`` rows is one key head that all query heads share (multi-query attention).
    """
    heads, head_dim = queries.shape[-2:]
    if key_weight.shape[0] == head_dim:
        return queries @ key_weight
    return torch.einsum("...he,hed->...hd", queries, key_weight.view(heads, head_dim, -1))


def project_pooled(
    pooled: Float[Tensor, "*batch heads dim"],
    value_weight: Float[Tensor, "rows dim"],
    value_bias: Float[Tensor, "rows"] | None = None,
    shared: bool = False,
) -> Float[Tensor, "*batch inner"]:
    """Project what each head pooled by its own rows of ``W_v`` and concatenate: ``concat_h W_v,h z_h (+ b)``.

    With ``shared`` every head is projected by the whole of ``W_v`` (one value head, multi-query attention).
    """
    if shared:
        return torch.nn.functional.linear(pooled, value_weight, value_bias).flatten(-2)
    *batch, heads, dim = pooled.shape
    by_head = pooled.movedim(-2, 0).reshape(heads, -1, dim)
    out = torch.bmm(by_head, value_weight.view(heads, -1, dim).mT).transpose(0, 1).reshape(*batch, -1)
    return out if value_bias is None else out + value_bias


def spread_heads(queries: Float[Tensor, "*batch heads head_dim"]) -> Float[Tensor, "*batch heads dim"]:
    """The fold for keys that are not projected: each head's query in its own block of channels, zero elsewhere."""
    heads = queries.shape[-2]
    own = torch.eye(heads, dtype=queries.dtype, device=queries.device)[:, :, None]
    return (queries.unsqueeze(-2) * own).flatten(-2)


def own_channels(pooled: Float[Tensor, "*batch heads dim"]) -> Float[Tensor, "*batch dim"]:
    """The counterpart for values that are not projected: of what each head pooled, its own block of channels."""
    blocks = pooled.unflatten(-1, (pooled.shape[-2], -1))
    return blocks.diagonal(dim1=-3, dim2=-2).transpose(-1, -2).flatten(-2)


def shifted_power(
    values: Float[Tensor, "batch tokens dim"],
    exponent: float,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    batch_minimum: bool = False,
) -> Float[Tensor, "batch tokens dim"]:
    """``(v - min(v) + 1e-6)^exponent`` in float32, the minimum over all channels of an item's real tokens; 0 on
    padding.

    ``batch_minimum`` takes the minimum over the whole batch instead.
    """
    wide = widen(values)
    kept = wide if mask is None else wide.masked_fill(~mask[..., None], float("inf"))
    low = kept.amin() if batch_minimum else kept.amin(dim=(1, 2), keepdim=True)
    shifted = wide - low + 1e-6
    if mask is None:
        return shifted.pow(exponent)
    # Padding may lie below the minimum, where a power is NaN and so would be its gradient: 1 in its place, then 0.
    return torch.where(mask[..., None], torch.where(mask[..., None], shifted, 1.0).pow(exponent), 0.0)
