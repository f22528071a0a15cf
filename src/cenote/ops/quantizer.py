"""Uniform grids for weights: how wide, which level, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

BITS = range(2, 9)
_SHRINK, _STEPS, _NORM = 0.8, 100, 2.4


@dataclass(frozen=True)
class GridSettings:
    """What kind of grid a weight matrix is rounded to.

    Args:
        bits: 2 to 8.
        symmetric: levels ``-2^(bits-1) .. 2^(bits-1) - 1`` times the scale; otherwise ``2^bits`` levels between the
            smallest and the largest weight, zero among them.
        clip_search: choose among 80 narrower grids the one with the smallest sum of ``|error|^2.4``.
        group_size: columns that share a scale; ``None`` for whole rows.
        dtype: what scales are rounded to. With the model's own type, levels times scale are the stored weights.

    Raises:
        ValueError: bits outside of 2 to 8, or an empty group.
    """

    bits: int = 3
    symmetric: bool = True
    clip_search: bool = True
    group_size: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits must be a whole number from 2 to 8, got {self.bits!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, or None for whole rows, got {self.group_size}")

    def check_columns(self, columns: int) -> None:
        """Raise if groups do not divide a row of ``columns`` weights."""
        if self.group_size is not None and columns % self.group_size:
            raise ValueError(f"group_size must divide the {columns} columns of every weight, got {self.group_size}")

    @property
    def zero_code(self) -> int:
        """What a symmetric level is moved by to be stored as a code from 0: ``2^(bits-1)``."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of each row (or each group of a row).

    Weight = ``scale * (code - zero)`` with whole codes from 0 to ``2^bits - 1``.

    Attributes:
        scale: ``(rows, 1)``, float32.
        zero: ``(rows, 1)``, whole numbers in float32.
        bits: of a code.
    """

    scale: Float[Tensor, "rows groups"]
    zero: Float[Tensor, "rows groups"]
    bits: int

    def encode(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The nearest codes."""
        # Rounded before the zero point is added: halves go to even levels, as in the official quantisers.
        return (torch.round(weight / self.scale) + self.zero).clamp(0, 2**self.bits - 1)

    def decode(self, codes: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """The weights that codes stand for."""
        return self.scale * (codes - self.zero)


def fit_grid(weight: Float[Tensor, "rows columns"], settings: GridSettings) -> Grid:
    """The grid of each row.

    Symmetric: ``scale = max(|w|, 1e-5) / (2^(bits-1) - 1)``. Asymmetric: ``scale = (max - min) / (2^bits - 1)`` with 0
    inside the range and ``zero = round(-min / scale)``. With ``clip_search`` the range is shrunk by 0 to 79 per cent.
    """
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if settings.symmetric:
        high = torch.maximum(low.abs(), high).clamp(min=1e-5)
    else:
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    best = _grid(low, high, settings)
    if settings.clip_search:
        scale, zero = best.scale.clone(), best.zero.clone()
        least = torch.full_like(low, torch.inf)
        for step in range(round(_SHRINK * _STEPS)):
            shrink = 1 - step / _STEPS
            tried = _grid(shrink * low, shrink * high, settings)
            error = (tried.decode(tried.encode(weight)) - weight).abs_().pow_(_NORM).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better[:, None], tried.scale, scale)
            zero = torch.where(better[:, None], tried.zero, zero)
        best = Grid(scale, zero, settings.bits)
    return best


def _grid(low: Tensor, high: Tensor, settings: GridSettings) -> Grid:
    if settings.symmetric:
        scale = high / (settings.zero_code - 1)
        zero = torch.full_like(scale, settings.zero_code)
    else:
        scale = (high - low).clamp(min=1e-5) / (2**settings.bits - 1)
        zero = torch.round(-low / scale)
    scale = scale.to(settings.dtype).float()
    return Grid(scale[:, None], zero[:, None], settings.bits)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix as codes: ``weight[r, c] = scale[r, g] (codes[r, c] - zero[r, g])`` with ``g = group[c]``.

    Attributes:
        codes: ``(rows, columns)`` uint8, 0 to ``2^bits - 1``.
        scale: ``(rows, groups)`` float32.
        zero: ``(rows, groups)`` whole numbers in float32.
        group: ``(columns,)`` which group a column belongs to.
        bits: of a code.
    """

    codes: Integer[Tensor, "rows columns"]
    scale: Float[Tensor, "rows groups"]
    zero: Float[Tensor, "rows groups"]
    group: Integer[Tensor, "columns"]
    bits: int

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The weights in float32."""
        return self.scale[:, self.group] * (self.codes.float() - self.zero[:, self.group])


def even_groups(columns: int, group_size: int | None, device: torch.device | None = None) -> Integer[Tensor, "columns"]:
    """Group of each column where groups are runs of neighbours."""
    return torch.arange(columns, device=device) // (group_size or columns)


def round_to_nearest(weight: Float[Tensor, "rows columns"], settings: GridSettings) -> QuantizedWeight:
    """Each weight to the nearest level of its group's grid (RTN).

    Raises:
        ValueError: groups that do not divide the columns.
    """
    weight = weight.float()
    rows, columns = weight.shape
    settings.check_columns(columns)
    grouped = weight.reshape(-1, settings.group_size or columns)
    grid = fit_grid(grouped, settings)
    codes = grid.encode(grouped).to(torch.uint8).view(rows, columns)
    groups = even_groups(columns, settings.group_size, weight.device)
    return QuantizedWeight(codes, grid.scale.view(rows, -1), grid.zero.view(rows, -1), groups, settings.bits)
