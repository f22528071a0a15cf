"""Rotary position embedding: a token's number becomes a rotation of its queries and keys."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    positions: Int[Tensor, "#batch tokens"],
    theta: float = 10000.0,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turn the pair ``(x_i, x_{i + head_dim/2})`` by the angle ``position * theta^(-2 i / head_dim)``.

    The pairing is that of Llama and Qwen: first half with second half. Inner products of rotated queries and keys
    depend on the difference of their positions only. Angles are taken in float32.

    Raises:
        ValueError: an odd head dimension.
    """
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"rotary positions need an even head dimension, got {x.shape[-1]}")
    rates = theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def real_positions(
    mask: Bool[Tensor, "batch tokens"], before: Int[Tensor, "batch"] | None = None
) -> Int[Tensor, "batch tokens"]:
    """Number of each token among the real ones of its row, counted on from ``before`` earlier ones; padding takes no
    number, so a token keeps its own wherever padding stands."""
    number = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return number if before is None else number + before[:, None]


def rotate_by(x: Float[Tensor, "*rows head_dim"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*rows head_dim"]:
    """Turn by given cosines and sines ``(..., width)``, as hosts hand them to their layers.

    Channels beyond ``width`` pass through; the first and second half of the others pair up.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if not rest.shape[-1] else torch.cat([turned, rest], dim=-1)


def unrotate(x: Float[Tensor, "*rows head_dim"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*rows head_dim"]:
    """The way back from :func:`rotate_by`, also where a host scales cosines and sines (YaRN)."""
    wide = cos.float().square() + sin.float().square()
    return rotate_by(x.float(), cos.float() / wide, -sin.float() / wide).to(x.dtype)
