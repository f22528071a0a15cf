"""Mean and standard deviation over tokens, with the variance taken about the mean."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import require_real_tokens, widen


def weighted_statistics(
    x: Float[Tensor, "batch tokens dim"],
    weights: Float[Tensor, "batch tokens #dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    floor: float = 1e-6,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Weighted mean ``mu = sum_n w_n x_n`` and deviation ``sigma = sqrt(max(sum_n w_n (x_n - mu)^2, floor))``.

    The variance is a sum of squares about the mean: the shorter ``E[x^2] - mu^2`` cancels, and turns negative, where
    the mean is large. The floor keeps the gradient of the root finite for a single token or equal ones.
    Computed in float32 or better, as sums rather than matrix products, which autocast would narrow.

    Args:
        x: tokens.
        weights: sum to one over the real tokens, one a token or one a token and channel.
        mask: real tokens; padding may hold anything.
        floor: smallest variance, in squared units of ``x``.

    Raises:
        ValueError: ``floor`` is not positive, or a row has no real token.
    """
    if not floor > 0:
        raise ValueError(f"the variance floor must be positive, got {floor}")
    require_real_tokens(mask)
    wide, weights = widen(x), widen(weights)
    if mask is not None:
        wide = torch.where(mask.unsqueeze(-1), wide, wide.new_zeros(()))
        weights = torch.where(mask.unsqueeze(-1), weights, weights.new_zeros(()))
    mean = (weights * wide).sum(dim=1)
    variance = (weights * (wide - mean.unsqueeze(1)).square()).sum(dim=1)
    return mean.to(x.dtype), variance.clamp(min=floor).sqrt().to(x.dtype)


def masked_statistics(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None, floor: float = 1e-6
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Mean and (population) standard deviation over real tokens; see :func:`weighted_statistics`."""
    require_real_tokens(mask)
    real = x.new_ones(x.shape[:2], dtype=torch.float32) if mask is None else mask.float()
    weights = real / real.sum(dim=1, keepdim=True)
    return weighted_statistics(x, weights.to(widen(x).dtype).unsqueeze(-1), mask, floor)
