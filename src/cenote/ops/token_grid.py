"""Where the tokens of a sequence lie on a grid.

Tokens fill a grid row by row. Padding takes no cell: among the tokens of an item only the real ones are counted, so an
item keeps its cells whatever padding stands before or behind it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Cells(NamedTuple):
    """Cells of tokens on a ``height x width`` grid.

    Attributes:
        height: rows of the grid.
        width: columns of the grid.
        cell: ``(batch, tokens)``, the cell ``row * width + column`` of each token, or ``height * width`` for a token
            that has none; ``None`` when token n of every item lies in cell n.
    """

    height: int
    width: int
    cell: Int[Tensor, "batch tokens"] | None = None


def locate(tokens: int, mask: Bool[Tensor, "batch tokens"] | None, grid: tuple[int, int] | None) -> Cells:
    """Find the cell of every token.

    With ``grid``: as many tokens as cells, then token n lies in cell n and a masked token leaves its cell empty; or
    more tokens than cells, then the real tokens of each item must fill the grid exactly. Without ``grid`` each item's
    real tokens form a square of its own, in the upper left corner of a common one.

    Raises:
        ValueError: the tokens do not fill the grid, or their number is not a square.
    """
    if grid is not None:
        height, width = grid
        if tokens == height * width:
            return Cells(height, width)
        if mask is None or tokens < height * width:
            raise ValueError(f"a grid of {height} x {width} needs {height * width} tokens, got {tokens}")
        _require(mask, mask.sum(dim=1) == height * width, f"fill a grid of {height} x {width}")
        return Cells(height, width, torch.where(mask, mask.cumsum(dim=1) - 1, height * width))
    side = math.isqrt(tokens)
    if mask is None:
        if side * side != tokens:
            raise ValueError(f"the number of tokens must be a square (or give grid=(height, width)), got {tokens}")
        return Cells(side, side)
    count = mask.sum(dim=1, keepdim=True)
    own = count.double().sqrt().round().long()
    _require(mask, (own * own == count)[:, 0], "form a square (or give grid=(height, width))")
    rank = mask.cumsum(dim=1) - 1
    index = torch.div(rank, own.clamp(min=1), rounding_mode="floor") * side + rank.remainder(own.clamp(min=1))
    return Cells(side, side, torch.where(mask, index, side * side))


def _require(mask: Tensor, fits: Tensor, what: str) -> None:
    if torch.compiler.is_compiling() or bool(fits.all()):
        return
    rows = (~fits).nonzero().flatten().tolist()[:10]
    raise ValueError(f"the real tokens of every item must {what}; row(s) {rows} have {mask.sum(dim=1)[rows].tolist()}")


def to_map(
    x: Float[Tensor, "batch tokens dim"], cells: Cells, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch dim height width"]:
    """Tokens on their cells; empty cells hold 0, as everything outside a zero-padded map does."""
    size = cells.height * cells.width
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)
    if cells.cell is not None:
        canvas = x.new_zeros(x.shape[0], size + 1, x.shape[2])
        x = canvas.scatter(1, cells.cell[..., None].expand_as(x), x)[:, :size]
    return x.transpose(1, 2).unflatten(2, (cells.height, cells.width))


def flatten_map(kind: str, x: Float[Tensor, "batch dim height width"], grid: tuple[int, int]) -> Tensor:
    """``(batch, dim, cells)``; ``ValueError`` where the map is not of the ``grid`` that the module was built for."""
    if tuple(x.shape[2:]) != tuple(grid):
        raise ValueError(f"{kind} was built for maps of {tuple(grid)}, got {tuple(x.shape[2:])}")
    return x.flatten(2)


def from_map(x: Float[Tensor, "batch dim height width"], cells: Cells) -> Float[Tensor, "batch tokens dim"]:
    """The cell of each token back as a token; 0 for tokens that have none."""
    flat = x.flatten(2).transpose(1, 2)
    if cells.cell is None:
        return flat
    flat = torch.nn.functional.pad(flat, (0, 0, 0, 1))
    return flat.gather(1, cells.cell[..., None].expand(-1, -1, flat.shape[2]))


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "cells dim"]:
    """Fixed sine and cosine embedding of a grid: the first half of the channels encodes the column, the second the row.

    A coordinate p becomes ``[sin(p w_i), cos(p w_i)]`` with ``w_i = 10000^(-4 i / dim)``, ``i < dim / 4``.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sine-cosine embedding needs dim divisible by 4, got {dim}")
    height, width = grid
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    angles = [place.reshape(-1, 1) * rate for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()
