"""Reductions over tokens that padding cannot influence.

Every function takes ``mask`` with ``True`` for a real token (``None`` means all are real), computes in float32 or
better, returns the dtype of its input, and refuses a row without a real token with ``ValueError``. Under
torch.compile and torch.export that check is left out, since it would read a value from the graph: check once outside
with :func:`require_real_tokens`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def require_real_tokens(mask: Bool[Tensor, "batch tokens"] | None) -> None:
    """Raise ``ValueError`` naming the rows of ``mask`` that hold no real token."""
    if mask is None or torch.compiler.is_compiling():
        return
    real = mask.any(dim=-1)
    if not bool(real.all()):
        rows = (~real).nonzero().flatten().tolist()
        raise ValueError(f"every row needs at least one real token, but the mask is all False in row(s) {rows[:10]}")


def widen(x: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is already float32 or float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def masked_mean(
    x: Float[Tensor, "batch tokens *rest"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch *rest"]:
    """Mean over real tokens: ``sum_n m_n x_n / sum_n m_n``."""
    require_real_tokens(mask)
    wide = widen(x)
    if mask is None:
        return wide.mean(dim=1).to(x.dtype)
    keep = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
    total = torch.where(keep, wide, wide.new_zeros(())).sum(dim=1)
    count = mask.sum(dim=1).reshape(-1, *(1,) * (x.ndim - 2))
    return (total / count).to(x.dtype)


def masked_max(
    x: Float[Tensor, "batch tokens *rest"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch *rest"]:
    """Maximum over real tokens; the gradient goes to the maximal token."""
    require_real_tokens(mask)
    if mask is not None:
        keep = mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))
        x = x.masked_fill(~keep, float("-inf"))
    return x.max(dim=1).values


def masked_softmax(
    scores: Float[Tensor, "batch *rest tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch *rest tokens"]:
    """Softmax over the last axis with weight 0 on padding; float32 result for half-precision scores."""
    require_real_tokens(mask)
    wide = widen(scores)
    if mask is not None:
        keep = mask.reshape(mask.shape[0], *(1,) * (scores.ndim - 2), mask.shape[1])
        wide = wide.masked_fill(~keep, float("-inf"))
    return wide.softmax(dim=-1)


def zero_padding(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens dim"]:
    """Padding set to 0, so that whatever it held, NaN too, cannot spread through products with a weight of 0."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


def masked_batch_norm(
    x: Float[Tensor, "batch tokens dim"],
    running_mean: Float[Tensor, "dim"],
    running_var: Float[Tensor, "dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    weight: Float[Tensor, "dim"] | None = None,
    bias: Float[Tensor, "dim"] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Float[Tensor, "batch tokens dim"]:
    """Batch normalisation of channels with statistics over the real tokens of the whole batch.

    ``(x - mean) / sqrt(var + eps) * weight + bias``. In training, mean and (biased) variance are those of the batch,
    and the running statistics move towards mean and unbiased variance by ``momentum``, in place; otherwise the running
    statistics are used. As ``torch.nn.functional.batch_norm`` on the real tokens laid end to end; padding comes out
    as 0 would.

    Raises:
        ValueError: training on a single token, whose variance says nothing.
    """
    require_real_tokens(mask)
    wide = zero_padding(widen(x), mask)
    mean, var = running_mean, running_var
    if training:
        if mask is None and x.shape[0] * x.shape[1] < 2:
            raise ValueError(f"batch normalisation in training needs more than one token, got shape {tuple(x.shape)}")
        count = wide.new_tensor(float(x.shape[0] * x.shape[1])) if mask is None else mask.sum().to(wide.dtype)
        mean = wide.sum(dim=(0, 1)) / count
        var = zero_padding(wide - mean, mask).square().sum(dim=(0, 1)) / count
        track_statistics(running_mean, running_var, mean, var, count, momentum)
    out = (wide - mean) * (var + eps).rsqrt()
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)


@torch.no_grad()
def track_statistics(
    running_mean: Float[Tensor, "dim"],
    running_var: Float[Tensor, "dim"],
    mean: Float[Tensor, "dim"],
    var: Float[Tensor, "dim"],
    count: Float[Tensor, ""],
    momentum: float,
) -> None:
    """Move running statistics by ``momentum`` towards a batch's mean and unbiased variance, in place; ``var`` is the
    biased variance of ``count`` values."""
    unbiased = var * (count / (count - 1).clamp(min=1))
    running_mean.mul_(1 - momentum).add_(mean.detach().to(running_mean.dtype) * momentum)
    running_var.mul_(1 - momentum).add_(unbiased.detach().to(running_var.dtype) * momentum)
