"""Power means over tokens, in the log domain."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import require_real_tokens, widen


def power_mean(
    x: Float[Tensor, "batch tokens dim"],
    p: Float[Tensor, "#dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "batch dim"]:
    """Power mean of the real tokens: ``(1/n sum_n y_n^p)^(1/p)`` with ``y = max(x, eps)``.

    Evaluated as ``exp((logsumexp_n(p ln y_n) - ln n) / p)``, so neither a large ``p`` nor a tiny ``y`` leaves the
    range of float32, which is what it computes in (or float64), under autocast too. ``p = 1`` is the mean, ``p`` to 0
    the geometric mean, ``p`` to infinity the maximum. Where ``x < eps`` the gradient is zero.

    Args:
        x: tokens; values below ``eps`` count as ``eps``.
        p: positive exponents, one a channel or one for all.
        mask: real tokens; padding may hold anything, NaN too.
        eps: smallest value.

    Raises:
        ValueError: ``eps`` is not positive, or a row has no real token.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    require_real_tokens(mask)
    y = widen(x)
    if mask is not None:
        y = torch.where(mask.unsqueeze(-1), y, y.new_ones(()))
    scaled = widen(p) * y.clamp(min=eps).log()
    if mask is None:
        log_count = scaled.new_tensor(x.shape[1]).log()
    else:
        scaled = scaled.masked_fill(~mask.unsqueeze(-1), float("-inf"))
        log_count = mask.sum(dim=1, keepdim=True).to(scaled.dtype).log()
    return ((scaled.logsumexp(dim=1) - log_count) / widen(p)).exp().to(x.dtype)


def clamped_fraction(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None, eps: float = 1e-6
) -> Float[Tensor, ""]:
    """Share of the real entries that :func:`power_mean` lifts to ``eps``, between 0 and 1.

    Those entries lose their value and their gradient; with signed tokens it is about a half.
    """
    require_real_tokens(mask)
    below = (x < eps).float()
    return below.mean() if mask is None else below[mask].mean()
