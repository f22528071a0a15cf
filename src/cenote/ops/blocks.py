"""Tokens in blocks: pooling with a short last block, and masks of pairs of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def num_blocks(tokens: int, block_size: int) -> int:
    """Blocks that so many tokens fill, the last one maybe short.

    Raises:
        ValueError: a block size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    return -(-tokens // block_size)


def pool_blocks(
    x: Float[Tensor, "batch heads tokens dim"],
    block_size: int,
    kind: str = "mean",
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads blocks dim"]:
    """Mean, maximum or minimum of the real tokens of each block; 0 for a block that has none.

    The last block may be short: its mean divides by the tokens it has. Means run in float32.

    Raises:
        ValueError: an unknown kind, or a block size below 1.
    """
    if kind not in ("mean", "max", "min"):
        raise ValueError(f"kind must be 'mean', 'max' or 'min', got {kind!r}")
    tokens = x.shape[2]
    missing = num_blocks(tokens, block_size) * block_size - tokens
    if mask is None and missing:
        mask = torch.ones(x.shape[0], tokens, dtype=torch.bool, device=x.device)
    parts = F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block_size))
    if mask is None:
        if kind == "mean":
            return parts.float().mean(dim=3).to(x.dtype)
        return parts.amax(dim=3) if kind == "max" else parts.amin(dim=3)
    real = F.pad(mask, (0, missing)).unflatten(1, (-1, block_size))[:, None, :, :, None]
    if kind == "mean":
        total = (parts.float() * real).sum(dim=3)
        return (total / real.sum(dim=3).clamp(min=1)).to(x.dtype)
    fill = float("-inf") if kind == "max" else float("inf")
    filled = parts.masked_fill(~real, fill)
    best = filled.amax(dim=3) if kind == "max" else filled.amin(dim=3)
    return best.masked_fill(~real.any(dim=3), 0.0)


def causal_blocks(
    query_blocks: int, key_blocks: int, device: torch.device | None = None
) -> Bool[Tensor, "query_blocks key_blocks"]:
    """Pairs of blocks of which some query sees some key, the last query being at the last key: on and below the
    diagonal that ends in the last corner."""
    seen = torch.ones(query_blocks, key_blocks, dtype=torch.bool, device=device)
    return seen.tril(key_blocks - query_blocks)


def block_mask_to_tokens(
    block_mask: Bool[Tensor, "*rows query_blocks key_blocks"], block_size: int, queries: int, keys: int
) -> Bool[Tensor, "*rows queries keys"]:
    """The mask of token pairs that a mask of block pairs stands for: the plain form, for tests and small inputs."""
    rows = block_mask.repeat_interleave(block_size, dim=-2)[..., :queries, :]
    return rows.repeat_interleave(block_size, dim=-1)[..., :keys]


def density(block_mask: Bool[Tensor, "batch heads query_blocks key_blocks"], causal: bool = True) -> float:
    """Share of the block pairs that could be attended to which are."""
    if not causal:
        return float(block_mask.float().mean())
    seen = causal_blocks(block_mask.shape[-2], block_mask.shape[-1], block_mask.device)
    return float((block_mask & seen).sum() / (seen.sum() * block_mask.shape[0] * block_mask.shape[1]))
