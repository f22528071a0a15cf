"""Mean and standard deviation over tokens, with the variance taken about the mean."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    Computed in float32 or better, as sums rather than matrix products, which autocast would narrow. Differentiable
    once.

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
    weights = widen(weights)
    if mask is not None:
        weights = torch.where(mask.unsqueeze(-1), weights, weights.new_zeros(()))
    # A compiler fuses the plain form by itself.
    statistics = _weighted if torch.compiler.is_compiling() else _Weighted.apply
    mean, deviation, *_ = statistics(widen(x), weights, mask, floor)
    return mean.to(x.dtype), deviation.to(x.dtype)


def raw_moments(
    x: Float[Tensor, "batch tokens dim"], weights: Float[Tensor, "batch tokens dim"], floor: float
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """``mu = sum_n w_n x_n`` and ``sigma = sqrt(max(sum_n w_n x_n^2 - mu^2, floor))`` for weights that need not sum to
    one, where this is no deviation. Cancels for a large mean: only for code that was trained with it."""
    wide = widen(x)
    mean = (weights * wide).sum(dim=1)
    variance = (weights * wide.square()).sum(dim=1) - mean.square()
    return mean.to(x.dtype), variance.clamp(min=floor).sqrt().to(x.dtype)


def masked_statistics(
    x: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    floor: float = 1e-6,
    correction: int = 0,
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Mean and standard deviation over the N real tokens, about the mean as in :func:`weighted_statistics`.

    ``sigma = sqrt(max(sum_n (x_n - mu)^2 / max(N - correction, 1), floor))``: ``correction=0`` is the population's
    deviation, 1 the unbiased one, which of a single token is the floor's root instead of NaN. Differentiable once.
    """
    if not floor > 0:
        raise ValueError(f"the variance floor must be positive, got {floor}")
    require_real_tokens(mask)
    statistics = _statistics if torch.compiler.is_compiling() else _Statistics.apply
    mean, deviation, _ = statistics(widen(x), mask, floor, correction)
    return mean.to(x.dtype), deviation.to(x.dtype)


def _statistics(x: Tensor, mask: Tensor | None, floor: float, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation, and the tokens less their mean, 0 in padding."""
    if mask is None:
        mean = x.mean(dim=1)
        centred = x - mean.unsqueeze(1)
    else:
        x = torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
        mean = x.sum(dim=1) / _count(x, mask)
        centred = torch.addcmul(x, mask.unsqueeze(-1).to(x.dtype), mean.unsqueeze(1), value=-1)
    variance = centred.square().sum(dim=1) / (_count(x, mask) - correction).clamp(min=1)
    return mean, variance.clamp(min=floor).sqrt(), centred


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_full((1, 1), x.shape[1]) if mask is None else mask.sum(dim=1, keepdim=True).to(x.dtype)


class _Statistics(torch.autograd.Function):
    """:func:`_statistics` with a gradient in two passes over the tokens, where automatic differentiation takes ten."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, floor: float, correction: int) -> tuple[Tensor, Tensor, Tensor]:
        return _statistics(x, mask, floor, correction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, mask, ctx.floor, ctx.correction = inputs
        _, deviation, centred = output
        ctx.mark_non_differentiable(centred)
        ctx.save_for_backward(mask, deviation, centred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_deviation: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mask, deviation, centred = ctx.saved_tensors
        count = _count(centred, mask)
        above = deviation > ctx.floor**0.5
        scale = grad_deviation * above / ((count - ctx.correction).clamp(min=1) * deviation)
        shift = (grad_mean / count).unsqueeze(1)
        real = shift.new_ones(()) if mask is None else mask.unsqueeze(-1).to(shift.dtype)
        return torch.addcmul(centred * scale.unsqueeze(1), real, shift), None, None, None


def _weighted(x: Tensor, weights: Tensor, mask: Tensor | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation, and the tokens less their mean; ``weights`` are 0 in padding."""
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
    mean = (weights * x).sum(dim=1)
    centred = x - mean.unsqueeze(1)
    variance = (centred.square() * weights).sum(dim=1)
    return mean, variance.clamp(min=floor).sqrt(), centred


class _Weighted(torch.autograd.Function):
    """:func:`_weighted` with its gradient written out for weights that sum to one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weights: Tensor, mask: Tensor | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
        return _weighted(x, weights, mask, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, weights, _, ctx.floor = inputs
        mean, deviation, centred = output
        ctx.mark_non_differentiable(centred)
        ctx.save_for_backward(weights, mean, deviation, centred)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_deviation: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        weights, mean, deviation, centred = ctx.saved_tensors
        grad_mean = grad_mean.unsqueeze(1)
        slope = (grad_deviation * (deviation > ctx.floor**0.5) / deviation).unsqueeze(1)
        grad_x = torch.addcmul(grad_mean, centred, slope) * weights
        # Of the variance, the derivative by a token is 2 weight centred, by a weight centred^2. A weight's gradient in
        # padding does no harm: the caller set it to 0.
        grad_weights = torch.addcmul(grad_mean, centred, slope / 2) * centred
        constant = grad_mean * mean.unsqueeze(1)
        if weights.shape[-1] == 1:
            grad_weights, constant = grad_weights.sum(dim=-1, keepdim=True), constant.sum(dim=-1, keepdim=True)
        return grad_x, grad_weights + constant, None, None
