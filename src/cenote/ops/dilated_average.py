"""Averages of 3 x 3 neighbourhoods whose cells stand some way apart."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from cenote.ops.masked import widen


def dilated_average(
    x: Float[Tensor, "batch dim height width"],
    dilation: int,
    *,
    count_include_pad: bool = True,
    keep: Bool[Tensor, "batch height width"] | None = None,
) -> Float[Tensor, "batch dim height width"]:
    """Mean over each cell and the eight at distance ``dilation`` along rows, columns and both.

    ``y[i, j] = sum_{a, b in {-d, 0, d}} x[i + a, j + b] / 9`` with 0 outside of the map. Dilation 0 is the map itself.
    The sum of nine is taken as three of three, which keeps the memory layout of ``x`` and makes no copy of nine maps.

    Args:
        x: feature maps; cells outside ``keep`` are read as 0.
        dilation: distance of the neighbours, in cells.
        count_include_pad: divide by 9 everywhere, so that borders fall towards 0 (what published TAP weights expect);
            otherwise by the number of cells that there are, so that a constant map stays as it is.
        keep: cells that exist; ``None`` for all.

    Raises:
        ValueError: a negative dilation.
    """
    if dilation < 0:
        raise ValueError(f"a dilation is 0 or more, got {dilation}")
    if keep is not None:
        x = x.masked_fill(~keep[:, None], 0.0)
    if dilation == 0:
        return x
    total = _box_sum(widen(x), dilation)
    if count_include_pad:
        return (total / 9).to(x.dtype)
    there = total.new_ones(1, 1, *x.shape[2:]) if keep is None else keep[:, None].to(total.dtype)
    return (total / _box_sum(there, dilation).clamp(min=1)).to(x.dtype)


def _box_sum(x: Tensor, dilation: int) -> Tensor:
    """Sums of nine, first down the columns, then along the rows."""
    down = F.pad(x, (0, 0, dilation, dilation))
    height, width = x.shape[2:]
    x = down[:, :, :height] + down[:, :, dilation : dilation + height] + down[:, :, 2 * dilation :]
    across = F.pad(x, (dilation, dilation))
    return across[..., :width] + across[..., dilation : dilation + width] + across[..., 2 * dilation :]
