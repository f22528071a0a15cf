"""Position-weighted mean."""

from __future__ import annotations

import torch
from torch import Tensor

from cenote.ops.masked import masked_mean, widen
from cenote.pooling.base import Pooling


class WeightedMean(Pooling):
    """Mean that weighs by position, ``sum_i i x_i / sum_i i`` over the real tokens ``i = 1..n``; no parameters.

    Later tokens of a causal model have seen more of the text. Source: "SGPT: GPT Sentence Embeddings for Semantic
    Search" (arXiv 2202.08904). Positions count real tokens only, so padding on the left shifts nothing.
    """

    name = "weighted_mean"
    permutation_invariant = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        wide = widen(tokens)
        position = mask.cumsum(dim=1).to(wide.dtype)
        count = mask.sum(dim=1, keepdim=True).to(wide.dtype)
        # The mean of weights 2i / (n + 1), which average to one.
        weights = 2 * position / (count + 1)
        return masked_mean(wide * weights.unsqueeze(-1), mask).to(tokens.dtype), None
