"""Means over square windows of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def box_mean(
    x: Float[Tensor, "batch dim height width"],
    size: int,
    keep: Bool[Tensor, "batch height width"] | None = None,
) -> Float[Tensor, "batch dim height width"]:
    """Mean over the ``size x size`` window around each cell, of those cells alone that lie inside the map.

    Args:
        x: the map; cells outside ``keep`` may hold anything.
        size: odd side of the window.
        keep: cells that count; ``None`` for all. A window without any gives 0.

    Raises:
        ValueError: a size that is not odd and positive.
    """
    require_odd(size)
    if keep is None:
        # The share of each window that lies inside, from its rows and its columns.
        rows, columns = (_inside(length, size, x) for length in x.shape[2:])
        return _zero_padded_mean(x, size).div_(rows[:, None] * columns)
    real = keep[:, None].to(x.dtype)
    share = _zero_padded_mean(real, size)
    total = _zero_padded_mean(x.masked_fill(~keep[:, None], 0.0), size)
    return total / torch.where(share > 0, share, 1.0)


def require_odd(size: int) -> None:
    """Raise ``ValueError`` unless a window of this side has a cell in its middle."""
    if not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"pool_size must be odd and positive, so that the map keeps its size, got {size!r}")


def _zero_padded_mean(x: Tensor, size: int) -> Tensor:
    """The sum over each window, cells outside being 0, divided by ``size^2``."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        # A depthwise convolution with a constant kernel takes a third of the time of avg_pool2d or less.
        kernel = x.new_full((x.shape[1], 1, size, size), 1 / size**2)
        return F.conv2d(x.contiguous(memory_format=torch.channels_last), kernel, None, 1, size // 2, 1, x.shape[1])
    return F.avg_pool2d(x, size, stride=1, padding=size // 2)


def _inside(length: int, size: int, like: Tensor) -> Tensor:
    """Share of the window around each of ``length`` places that lies inside."""
    place = torch.arange(length, device=like.device)
    count = (place + size // 2).clamp(max=length - 1) - (place - size // 2).clamp(min=0) + 1
    return (count / size).to(like.dtype)
