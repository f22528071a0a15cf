"""What block means of queries and keys say about the full attention, and the blocks that it asks for."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import widen


class BlockEstimate(NamedTuple):
    """What block means say about the full attention.

    Attributes:
        probs: estimated mass of every visual block and, with text, of all the text together in one last column;
            rows sum to 1. ``(batch, heads, blocks, columns)``.
        good: whether the estimate of a pair of blocks can be trusted, ``(batch, heads, blocks, blocks)``.
        values: mean value of every block, ``(batch, heads, blocks, head_dim)``.
    """

    probs: Tensor
    good: Tensor
    values: Tensor


def estimate_blocks(
    query: Float[Tensor, "batch heads visual head_dim"],
    key: Float[Tensor, "batch heads visual head_dim"],
    value: Float[Tensor, "batch heads visual head_dim"],
    block_size: int,
    text_key: Float[Tensor, "batch heads text head_dim"],
    text_mask: Bool[Tensor, "batch text"],
    mean: str = "real",
    scale: float | None = None,
) -> BlockEstimate:
    """Mass of every block and whether to believe it, from block means of queries and keys.

    ``P = softmax([scale q_i . k_j + log(size_j), logsumexp_t(scale q_i . k_t)])``: a block's mean key stands for its
    ``size_j`` keys, text keys are not pooled. ``good_ij = |q_i . k_j| > |dq_i . k_j| + |q_i . dk_j|`` with ``dq``,
    ``dk`` the mean absolute deviations inside the blocks. Deviations meet signed means before the absolute value, so
    terms cancel: an estimate of the error, not a bound. Float32 or better.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k = (_in_blocks(x, block_size, mean) for x in (query, key))
    q_mean, k_mean, v_mean = q.mean, k.mean, _in_blocks(value, block_size, mean).mean
    logits = q_mean @ k_mean.mT
    error = (q.deviation() @ k_mean.mT).abs() + (q_mean @ k.deviation().mT).abs()
    columns = scale * logits + k.sizes.log()
    if text_key.shape[2]:
        on_text = (scale * (q_mean @ widen(text_key).mT)).masked_fill(~text_mask[:, None, None], -math.inf)
        columns = torch.cat([columns, on_text.logsumexp(-1, keepdim=True)], dim=-1)
    return BlockEstimate(columns.softmax(-1), logits.abs() > error, v_mean)


def select_blocks(
    probs: Float[Tensor, "batch heads blocks columns"], p: float, top_k: int, blocks: int
) -> Bool[Tensor, "batch heads blocks kept"]:
    """The ``max(c + 1, top_k)`` columns of largest mass, ``c`` of them summing to at most ``p``; of these the blocks.

    ``p = 1`` and ``top_k >= blocks`` keep every block, whatever rounding does to the running sum.
    """
    if p >= 1 or top_k >= blocks:
        return torch.ones_like(probs[..., :blocks], dtype=torch.bool)
    ordered, index = probs.sort(dim=-1, descending=True)
    count = ((ordered.cumsum(-1) <= p).sum(-1, keepdim=True) + 1).clamp_min(top_k)
    leading = (torch.arange(probs.shape[-1], device=probs.device) < count).expand_as(probs)
    return torch.zeros_like(leading).scatter(-1, index, leading)[..., :blocks]


def pad_tokens(x: Tensor, tokens: int) -> Tensor:
    """So many zero tokens behind ``(batch, heads, tokens, dim)``."""
    return F.pad(x, (0, 0, 0, tokens)) if tokens else x


class _Blocks(NamedTuple):
    """Tokens by block in float32, which of them count, the counts and the means."""

    x: Tensor  # (batch, heads, blocks, block_size, head_dim)
    counted: Tensor | None  # (blocks, block_size, 1), or all
    sizes: Tensor  # (blocks,)
    mean: Tensor  # (batch, heads, blocks, head_dim)

    def deviation(self) -> Tensor:
        """Mean absolute deviation from the mean, by channel."""
        away = (self.x - self.mean.unsqueeze(3)).abs_()
        if self.counted is not None:
            away = away * self.counted
        return away.sum(3) / self.sizes[:, None]


def _in_blocks(x: Tensor, block_size: int, mean: str) -> _Blocks:
    tokens = x.shape[2]
    blocks = -(-tokens // block_size)
    pad = blocks * block_size - tokens
    parts = widen(pad_tokens(x, pad)).unflatten(2, (blocks, block_size))
    counted = None
    sizes = parts.new_full((blocks,), block_size)
    if pad and mean == "real":
        counted = torch.arange(blocks * block_size, device=x.device).view(blocks, block_size, 1) < tokens
        sizes = counted.sum((1, 2)).to(parts.dtype)
    return _Blocks(parts, counted, sizes, parts.sum(3) / sizes[:, None])
