"""An order of a grid's cells in which neighbours in the order are neighbours in space.

The generalised Hilbert curve ("gilbert") walks any box, not only cubes whose side is a power of two. Cutting the walk
into runs of ``b`` cells makes compact blocks where raster order would make thin lines, so tokens of one block look
alike and block attention loses less.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Axes = tuple[str, str, str]
GridShape = tuple[int, int, int]
"""Extents ``(frames, height, width)``; an image has one frame."""
AXES: Axes = ("w", "h", "t")


def hilbert_order(shape: Sequence[int], axis_order: Sequence[str] = AXES) -> Int[Tensor, "cells"]:
    """The cell at every position of the curve: ``curve[i] = grid.flatten()[order[i]]``.

    Cells are numbered in raster order, ``(z * height + y) * width + x``; :func:`inverse_order` gives the position of
    every cell. Consecutive cells differ by one step along one axis where all extents are even; odd extents cost a few
    diagonal steps. Axes of extent 1 never lead: a box ``(t, h, 1)`` is walked as the plane that it is.

    Args:
        shape: ``(frames, height, width)``, each at least 1.
        axis_order: which axis leads, ``"w"``, ``"h"`` and ``"t"`` in any order.

    Raises:
        ValueError: an extent below 1, or an axis order that is not a permutation of ``w, h, t``.
    """
    frames, height, width = checked_shape(shape)
    if sorted(axis_order) != sorted(AXES):
        raise ValueError(f"axis_order must hold each of {AXES} once, got {tuple(axis_order)}")
    first, second, third = axis_order
    return _order((frames, height, width), (first, second, third)).clone()


def inverse_order(order: Int[Tensor, "cells"]) -> Int[Tensor, "cells"]:
    """The permutation that undoes ``order``: ``x[order][inverse_order(order)] = x``."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return inverse


def block_neighbours(
    order: Int[Tensor, "cells"], shape: Sequence[int], block_size: int
) -> Bool[Tensor, "blocks blocks"]:
    """Which blocks of ``block_size`` consecutive cells of an order touch: a face, an edge or a corner in common.

    Symmetric, with a set diagonal. The last block may be smaller.

    Raises:
        ValueError: a block size below 1, or an order of another number of cells than the grid has.
    """
    frames, height, width = checked_shape(shape)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    check_cells(len(order), shape)
    blocks = -(-len(order) // block_size)
    owner = (inverse_order(order) // block_size).view(frames, height, width)
    touch = torch.eye(blocks, dtype=torch.bool, device=order.device)
    for offset in product((-1, 0, 1), repeat=3):
        here = owner[tuple(slice(max(0, -d), n - max(0, d)) for d, n in zip(offset, owner.shape, strict=True))]
        there = owner[tuple(slice(max(0, d), n - max(0, -d)) for d, n in zip(offset, owner.shape, strict=True))]
        touch[here.flatten(), there.flatten()] = True
    return touch


def checked_shape(shape: Sequence[int]) -> GridShape:
    """The three extents of a grid, or ``ValueError``."""
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"a grid needs three extents (frames, height, width) of at least 1, got {tuple(shape)}")
    frames, height, width = (int(n) for n in shape)
    return frames, height, width


def check_cells(cells: int, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` unless the grid has as many cells as there are tokens."""
    frames, height, width = shape
    if frames * height * width != cells:
        expected = f"{frames} x {height} x {width} = {frames * height * width}"
        raise ValueError(f"latent shape {tuple(shape)} has {expected} cells, got {cells} tokens")


class _Side(NamedTuple):
    """A side of a box: a signed number of cells along one axis, and the step of that axis in cell numbers."""

    cells: int
    stride: int

    @property
    def step(self) -> int:
        return self.stride if self.cells > 0 else -self.stride

    @property
    def span(self) -> int:
        """From the first cell to the cell behind the last."""
        return self.cells * self.stride

    @property
    def reach(self) -> int:
        """From the first cell to the last."""
        return self.span - self.step

    def __neg__(self) -> _Side:
        return _Side(-self.cells, self.stride)

    def halves(self) -> tuple[_Side, _Side]:
        """The second part and the first: the first one named is walked first, and is even where it can be."""
        half = self.cells // 2
        if half % 2 and abs(self.cells) > 2:
            half += 1 if self.cells > 0 else -1
        return _Side(half, self.stride), _Side(self.cells - half, self.stride)


@lru_cache(maxsize=32)
def _order(shape: GridShape, axis_order: Axes) -> Tensor:
    frames, height, width = shape
    sides = {"w": _Side(width, 1), "h": _Side(height, width), "t": _Side(frames, height * width)}
    a, b, c = (sides[axis] for axis in axis_order)
    if a.cells == 1:  # the recursion halves its leading side; a plane is walked with the flat axis last
        a, b, c = b, c, a
    cells: list[int] = []
    _walk(cells, 0, a, b, c)
    return torch.tensor(cells)


def _walk(cells: list[int], p: int, a: _Side, b: _Side, c: _Side) -> None:
    """Append the cells of the box at ``p`` with sides ``a`` (leading), ``b`` and ``c``; it is left beside ``p + a``."""
    width, height, depth = abs(a.cells), abs(b.cells), abs(c.cells)
    if not width * height * depth:
        return
    if sorted((width, height, depth))[1] == 1:
        longest = max(a, b, c, key=lambda side: abs(side.cells))
        cells.extend(p + i * longest.step for i in range(abs(longest.cells)))
        return
    (a2, a1), (b2, b1), (c2, c1) = a.halves(), b.halves(), c.halves()
    if 2 * width > 3 * height and 2 * width > 3 * depth:
        _walk(cells, p, a2, b, c)
        _walk(cells, p + a2.span, a1, b, c)
    elif 3 * height > 4 * depth:
        _walk(cells, p, b2, c, a2)
        _walk(cells, p + b2.span, a, b1, c)
        _walk(cells, p + a.reach + b2.span - b.step, -b2, c, -a1)
    elif 3 * depth > 4 * height:
        _walk(cells, p, c2, a2, b)
        _walk(cells, p + c2.span, a, b, c1)
        _walk(cells, p + a.reach + c2.span - c.step, -c2, -a1, b)
    else:
        _walk(cells, p, b2, c2, a2)
        _walk(cells, p + b2.span, c, a2, b1)
        _walk(cells, p + b2.span - b.step + c.reach, a, -b2, -c1)
        _walk(cells, p + a.reach + b2.span + c.reach, -c, -a1, b1)
        _walk(cells, p + a.reach + b2.span - b.step, -b2, c2, -a1)
