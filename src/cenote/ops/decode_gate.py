"""Which blocks of a cache matter to a single query: scores, what they choose, and what they learn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.attention_statistics import map_rows
from cenote.ops.block_gate import MASKED
from cenote.ops.blocks import num_blocks
from cenote.ops.precision import full_precision
from cenote.ops.selection import select_threshold, select_topk


def block_scores(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads blocks dim"],
    there: Bool[Tensor, "batch blocks"] | None = None,
) -> Float[Tensor, "batch heads queries blocks"]:
    """``softmax_j(q k_j^T / sqrt(dim))`` over the blocks that a row has; 0 for the others. Float32."""
    logits = _logits(query, key)
    if there is not None:
        logits = logits.masked_fill(~there[:, None, None], float("-inf"))
    return logits.softmax(dim=-1)


def choose_decode_blocks(
    scores: Float[Tensor, "batch heads blocks"],
    there: Bool[Tensor, "batch blocks"] | None = None,
    *,
    budget: int = 1,
    threshold: float | None = None,
    first: bool = True,
) -> Bool[Tensor, "batch heads blocks"]:
    """The best blocks, and always a row's last and first one.

    Args:
        scores: of the blocks, shares of 1.
        there: which blocks a row has; all of them unless given.
        budget: how many of the best blocks are chosen, or all of them where there are fewer.
        threshold: choose the blocks whose score is strictly above it instead; 0 chooses all.
        first: whether the first block is always chosen too.

    Raises:
        ValueError: ``budget`` below 1, or a row that has no block.
    """
    if there is None:
        there = torch.ones(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
    if not bool(there.any(dim=1).all()):
        raise ValueError("a row has no block: every row needs a real token")
    allowed = there.unsqueeze(1).expand_as(scores)
    if threshold == 0:
        return allowed.clone()
    if threshold is None:
        chosen = select_topk(scores, budget, allowed)
    else:
        chosen = select_threshold(scores, threshold, allowed, keep_best=False)
    place = torch.arange(there.shape[1], device=there.device)
    always = place == there.shape[1] - 1 - there.flip(1).byte().argmax(dim=1, keepdim=True)
    if first:
        always |= place == there.byte().argmax(dim=1, keepdim=True)
    return chosen | always.unsqueeze(1)


def earlier_blocks(
    tokens: int, block_size: int, device: torch.device | None = None, first: int = 0
) -> Bool[Tensor, "rows blocks"]:
    """Which blocks lie wholly in front of the own one of each token from ``first`` on."""
    own = torch.arange(first, tokens, device=device) // block_size
    return torch.arange(num_blocks(tokens, block_size), device=device) < own[:, None]


def decode_target(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    block_size: int,
    scale: float | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch kv_heads tokens blocks"]:
    """What a gate learns: the largest attention probability in each earlier block, over the heads that share a key
    and value head, rows divided by their sums. Rows of the first block, and of padding, are 0. Made a stretch of
    queries at a time.
    """
    tokens = key.shape[2]
    missing = num_blocks(tokens, block_size) * block_size - tokens
    rows = []
    for _, weights in map_rows(query, key, mask, scale=scale):
        best = F.pad(weights, (0, missing)).unflatten(-1, (-1, block_size)).amax(dim=-1)
        rows.append(best.unflatten(1, (key.shape[1], -1)).amax(dim=2))
    target = torch.cat(rows, dim=2) * earlier_blocks(tokens, block_size, key.device)
    return target / (target.sum(dim=-1, keepdim=True) + 1e-9)


def decode_gate_logits(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch heads blocks dim"],
    block_size: int,
    first: int = 0,
) -> Float[Tensor, "batch heads rows blocks"]:
    """``q_i k_j^T / sqrt(dim)`` of the tokens from ``first`` on and every block, as training needs them;
    :data:`MASKED` where block ``j`` does not lie wholly in front of the block of ``i``."""
    return _logits(query, key).masked_fill(
        ~earlier_blocks(first + query.shape[2], block_size, query.device, first), MASKED
    )


def _logits(query: Tensor, key: Tensor) -> Tensor:
    with full_precision(query):
        return query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
