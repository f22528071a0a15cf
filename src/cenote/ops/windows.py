"""Maxima over thousands of windows of shared feature maps.

The maximum over any range of length ``l`` is the maximum of two ranges of length ``2^k <= l`` that overlap inside it.
So with tables of maxima over all squares of power-of-two sides, made once a map, every bin of every window costs four
look-ups whatever its size.
"""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PIECE = 4096


def window_max_pool(
    maps: Float[Tensor, "batch dim height width"],
    windows: Int[Tensor, "regions 4"],
    n: int,
    batch_index: Int[Tensor, "regions"],
) -> Float[Tensor, "regions dim {n} {n}"]:
    """Adaptive maximum of each window into ``n x n`` bins, as if the window were cut out and pooled alone.

    Bin ``i`` of a window of ``h`` rows covers its rows ``floor(i h / n)`` to ``ceil((i + 1) h / n)`` exclusive,
    columns alike, in integer arithmetic; where ``h < n`` bins repeat cells. Cells outside the window are never read.

    Args:
        maps: shared feature maps.
        windows: cells ``x0, y0, x1, y1``, 0-based and half-open.
        n: bins a side.
        batch_index: which map each window lies on.

    Raises:
        ValueError: ``n`` is below 1, a window is empty or leaves its map, or an index names no map.
    """
    batch, dim, height, width = maps.shape
    _check(windows, n, batch_index, batch, height, width)
    x0, y0, x1, y1 = windows.long().unbind(dim=1)
    top, bottom, row_power, row_tables = _bins(y0, y1, n, height)
    left, right, column_power, column_tables = _bins(x0, x1, n, width)
    tables = []
    across = maps.permute(0, 2, 3, 1)
    for kx in range(column_tables):
        if kx:
            # Entries that wrap round the border are never looked up.
            across = torch.maximum(across, across.roll(-(1 << (kx - 1)), dims=2))
        down = across
        tables.append(down)
        for ky in range(1, row_tables):
            down = torch.maximum(down, down.roll(-(1 << (ky - 1)), dims=1))
            tables.append(down)
    table = torch.stack(tables).flatten(0, 3)

    which = (column_power.unsqueeze(1) * row_tables + row_power.unsqueeze(2)) * batch + batch_index.view(-1, 1, 1)
    bottom, right = bottom - (1 << row_power), right - (1 << column_power)

    def corner(rows: Tensor, columns: Tensor) -> Tensor:
        return ((which * height + rows.unsqueeze(2)) * width + columns.unsqueeze(1)).flatten()

    corners = (corner(top, left), corner(top, right), corner(bottom, left), corner(bottom, right))
    pieces = [corners]
    if table.device.type == "cpu" and not torch.compiler.is_compiling():
        # Pieces that stay in the processor's cache between look-up and maximum: twice as fast.
        pieces = list(zip(*(index.split(_PIECE) for index in corners), strict=True))
    pooled = torch.cat([reduce(torch.maximum, [table.index_select(0, i) for i in piece]) for piece in pieces])
    return pooled.view(-1, n, n, dim).permute(0, 3, 1, 2)


def _bins(start: Tensor, end: Tensor, n: int, length: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Bins ``(regions, n)``: first cell, last cell plus one, log2 of the power of two inside; and how many powers."""
    i = torch.arange(n, device=start.device)
    size = (end - start).unsqueeze(1)
    first = start.unsqueeze(1) + i * size // n
    last = start.unsqueeze(1) + ((i + 1) * size + n - 1) // n
    longest = min(length, -(-length // n) + 1)
    powers = [max(size, 1).bit_length() - 1 for size in range(longest + 1)]
    return first, last, torch.tensor(powers, device=start.device)[last - first], powers[-1] + 1


def _check(windows: Tensor, n: int, batch_index: Tensor, batch: int, height: int, width: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if torch.compiler.is_compiling() or not len(windows):
        return
    if int(batch_index.min()) < 0 or int(batch_index.max()) >= batch:
        raise ValueError(f"batch_index must lie in 0..{batch - 1}, got {batch_index.tolist()[:10]}")
    x0, y0, x1, y1 = windows.unbind(dim=1)
    wrong = (x0 < 0) | (y0 < 0) | (x1 <= x0) | (y1 <= y0) | (x1 > width) | (y1 > height)
    if bool(wrong.any()):
        raise ValueError(
            f"windows (x0, y0, x1, y1) must be non-empty and inside maps of {height} x {width} cells, "
            f"got {windows[wrong][0].tolist()}"
        )
