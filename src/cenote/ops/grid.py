"""Token grids of one size to token grids of another."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from cenote.ops.masked import require_real_tokens, widen


def resample_tokens(
    tokens: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    size: tuple[int, int],
    mode: Literal["bilinear", "average"] = "bilinear",
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch resampled dim"], Bool[Tensor, "batch resampled"] | None]:
    """Resample tokens that form a grid, row by row, and their mask.

    Args:
        tokens: ``grid[0] * grid[1]`` tokens an item.
        grid: rows and columns of the tokens.
        size: rows and columns of the result.
        mode: ``"bilinear"`` interpolates between cell centres; ``"average"`` takes the mean of the cells
            ``floor(i H / n)`` to ``ceil((i + 1) H / n)`` exclusive, and columns alike.
        mask: real tokens. Each new token is the weighted mean of the real cells it draws on, weights renormalised,
            and is real if there is any; otherwise it is 0.

    Returns:
        ``(batch, size[0] * size[1], dim)`` in the dtype of the tokens (computed in float32 or better), and the new
        mask, ``None`` without one.

    Raises:
        ValueError: the tokens do not fill the grid, a side is below 1, unknown mode, a row without a real token.
    """
    if min(*grid, *size) < 1 or tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"cannot resample {tokens.shape[1]} tokens as a {grid[0]} x {grid[1]} grid to {size[0]} x {size[1]}"
        )
    if mode not in ("bilinear", "average"):
        raise ValueError(f"mode must be 'bilinear' or 'average', got {mode!r}")
    require_real_tokens(mask)

    def resample(x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, grid)
        if mode == "average":
            maps = adaptive_avg_pool2d(maps, size)
        else:
            maps = interpolate(maps, size, mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    wide = widen(tokens)
    if mask is None:
        return resample(wide).to(tokens.dtype), None
    real = mask.unsqueeze(-1)
    total = resample(torch.where(real, wide, wide.new_zeros(())))
    share = resample(real.to(wide.dtype))
    there = share > 0
    mean = torch.where(there, total / share.where(there, share.new_ones(())), total.new_zeros(()))
    return mean.to(tokens.dtype), there.squeeze(-1)
