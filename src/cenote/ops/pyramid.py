"""Spatial pyramids of maxima: n x n adaptive grids for several n, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.masked import require_real_tokens
from cenote.ops.positions import first_real, last_real
from cenote.ops.windows import window_max_pool


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels as a tuple; ``ValueError`` unless they are one or more whole numbers from 1."""
    if not len(levels) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in levels):
        raise ValueError(f"levels must be one or more whole numbers from 1, such as (4, 2, 1), got {levels!r}")
    return tuple(levels)


def adaptive_max_pool(maps: Float[Tensor, "*batch height width"], n: int) -> Float[Tensor, "*batch {n} {n}"]:
    """Maximum over an ``n x n`` grid of bins that covers the map.

    Bin ``(i, j)`` covers rows ``floor(i H / n)`` to ``ceil((i + 1) H / n)`` exclusive and columns alike, in integer
    arithmetic, rows first and columns after. Equal to ``torch.nn.AdaptiveMaxPool2d(n)``, made of slices that every
    exporter knows.
    """

    def edges(length: int) -> list[tuple[int, int]]:
        return [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]

    height, width = maps.shape[-2:]
    rows = torch.stack([maps[..., a:b, :].amax(dim=-2) for a, b in edges(height)], dim=-2)
    return torch.stack([rows[..., a:b].amax(dim=-1) for a, b in edges(width)], dim=-1)


def level_sources(levels: Sequence[int]) -> dict[int, int | None]:
    """For each level the smallest other level that is a multiple of it, or ``None``; finest first.

    If ``n`` divides ``m``, each bin of level ``n`` is the union of ``m/n x m/n`` bins of level ``m`` (their outer
    borders coincide), so its maximum is the maximum of theirs.
    """
    distinct = sorted(set(levels), reverse=True)
    return {n: min((m for m in distinct if m > n and m % n == 0), default=None) for n in distinct}


def spatial_pyramid_pool(
    maps: Float[Tensor, "batch dim height width"] | Sequence[Float[Tensor, "dim _ _"]],
    levels: Sequence[int],
    sizes: Int[Tensor, "batch 2"] | None = None,
    mask: Bool[Tensor, "batch height width"] | None = None,
    floor_at_zero: bool = False,
) -> Float[Tensor, "batch features"]:
    """Pyramid of each map: ``(batch, dim * sum n^2)``, laid out ``[level][channel][row][column]``.

    Args:
        maps: one batch, or a list of maps ``(dim, height, width)`` of different sizes.
        levels: grid sides ``n``, in the order of the output.
        sizes: real ``(height, width)`` of each map of a batch that was padded at the bottom and on the right. Without
            sizes (or a mask) every cell counts. Padding never wins a maximum, and may hold anything.
        mask: real cells, in place of ``sizes`` and anywhere on the map. The bins are laid over the smallest rectangle
            that holds a map's real cells; a bin without any real cell is 0.
        floor_at_zero: start every maximum at 0, as the official kernel does, so that negative maxima become 0.

    Raises:
        TypeError: integer maps.
        ValueError: bad levels or sizes, empty maps, sizes or mask beside a list, a map without real cells.
    """
    levels = check_levels(levels)
    if not isinstance(maps, Tensor):
        if sizes is not None or mask is not None or not len(maps):
            raise ValueError(
                "a list of maps must not be empty and takes neither sizes nor mask: each map has its own size"
            )
        return torch.cat([spatial_pyramid_pool(item[None], levels, floor_at_zero=floor_at_zero) for item in maps])
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating point, got {maps.dtype}")
    height, width = maps.shape[-2:]
    if height < 1 or width < 1:
        raise ValueError(f"maps must have at least one row and one column, got shape {tuple(maps.shape)}")
    if sizes is not None and mask is not None:
        raise ValueError("give sizes or mask, not both")
    every = torch.arange(maps.shape[0], device=maps.device)
    if sizes is not None:
        zero = torch.zeros_like(sizes[:, 0])
        windows = torch.stack([zero, zero, sizes[:, 1], sizes[:, 0]], dim=1)
        return pyramid_pool_windows(maps, windows, every, levels, floor_at_zero)
    if mask is not None:
        require_real_tokens(mask.flatten(1))
        rows, columns = mask.any(dim=2), mask.any(dim=1)
        edges = [first_real(columns), first_real(rows), last_real(columns) + 1, last_real(rows) + 1]
        real = maps.masked_fill(~mask.unsqueeze(1), float("-inf"))
        pooled = pyramid_pool_windows(real, torch.stack(edges, dim=1), every, levels, floor_at_zero)
        return pooled.masked_fill(pooled == float("-inf"), 0.0)
    return _assemble(levels, partial(adaptive_max_pool, maps), floor_at_zero)


def pyramid_pool_windows(
    maps: Float[Tensor, "batch dim height width"],
    windows: Int[Tensor, "regions 4"],
    batch_index: Int[Tensor, "regions"],
    levels: Sequence[int],
    floor_at_zero: bool = False,
) -> Float[Tensor, "regions features"]:
    """Pyramid of each window of shared maps, ``(regions, dim * sum n^2)``, as if it were cut out and pooled alone.

    Windows are cells ``x0, y0, x1, y1``, 0-based and half-open; errors as :func:`cenote.ops.windows.window_max_pool`.
    """
    levels = check_levels(levels)
    return _assemble(levels, lambda n: window_max_pool(maps, windows, n, batch_index), floor_at_zero)


def _assemble(levels: tuple[int, ...], pool: Callable[[int], Tensor], floor_at_zero: bool) -> Tensor:
    """Pool the levels that no other level gives, derive the rest, concatenate."""
    pooled: dict[int, Tensor] = {}
    for n, source in level_sources(levels).items():
        if source is None:
            pooled[n] = pool(n)
        else:
            step, finer = source // n, pooled[source]
            rows = reduce(torch.maximum, [finer[..., i::step, :] for i in range(step)])
            pooled[n] = reduce(torch.maximum, [rows[..., i::step] for i in range(step)])
    features = torch.cat([pooled[n].flatten(1) for n in levels], dim=1)
    return features.clamp(min=0) if floor_at_zero else features
