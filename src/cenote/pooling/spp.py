"""Spatial pyramid pooling (SPP)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from cenote.ops.pyramid import check_levels, spatial_pyramid_pool
from cenote.ops.token_grid import locate, to_map
from cenote.pooling.base import Pooling


class SPP(Pooling):
    """Maxima over ``n x n`` grids of the token map for several ``n``, side by side; no parameters.

    ``out[n, c, i, j] = max`` of channel ``c`` over bin ``(i, j)`` of level ``n``, flattened in that order:
    ``out_dim = dim * sum n^2`` whatever the size of the map. Source: "Spatial Pyramid Pooling in Deep Convolutional
    Networks for Visual Recognition" (arXiv 1406.4729). Bins are exact in integers (the official kernel rounds borders
    in float32), and the maximum is the true one; the official kernel starts at 0, option ``floor_at_zero``. Coarse
    levels are derived from finer ones that they divide, with identical results. Not to be confused with the "SPP"
    block of YOLO detectors (stride-1 maxima of several window sizes, stacked over channels) or with DeepLab's atrous
    pyramid ASPP. Regions of an image: :func:`cenote.ops.regions.spp_regions`.

    Tokens lie on a grid row by row, see :func:`cenote.ops.token_grid.locate`. With a mask the bins are laid over the
    smallest rectangle that holds an item's real tokens, so a map padded to the grid pools as if alone; a bin in which
    no token is real is 0.

    Args:
        dim: token width or channels of the maps.
        levels: grid sides; the paper's networks use ``(6, 3, 2, 1)`` on 13 x 13 maps.
        grid: rows and columns of the tokens, ``None`` for squares; :meth:`pool_maps` needs none.
        floor_at_zero: start every maximum at 0.
    """

    name = "spp"
    needs_grid = True
    paper = "spp"
    permutation_invariant = False

    def __init__(
        self,
        dim: int,
        levels: Sequence[int] = (4, 2, 1),
        grid: tuple[int, int] | None = None,
        floor_at_zero: bool = False,
    ) -> None:
        self.levels = check_levels(levels)
        super().__init__(dim, dim * sum(n * n for n in self.levels))
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid must be (rows, columns), both at least 1, got {grid}")
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.floor_at_zero = floor_at_zero

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        cells = locate(tokens.shape[1], mask, self.grid)
        maps, real = to_map(tokens, cells, mask), None
        if mask is not None:
            real = to_map(mask.unsqueeze(-1).to(tokens.dtype), cells).squeeze(1) > 0
        return spatial_pyramid_pool(maps, self.levels, mask=real, floor_at_zero=self.floor_at_zero), None

    def pool_maps(
        self,
        maps: Float[Tensor, "batch dim height width"] | Sequence[Float[Tensor, "dim _ _"]],
        sizes: Int[Tensor, "batch 2"] | None = None,
    ) -> Float[Tensor, "batch features"]:
        """Pool maps of any size: a batch, a padded batch with its ``sizes``, or a list of maps of different sizes.

        Args:
            maps: ``(batch, dim, height, width)``, or a sequence of ``(dim, height, width)``.
            sizes: real ``(height, width)`` of each map of a batch padded at the bottom and on the right. A batch
                without sizes is taken to have no padding.

        Raises:
            ValueError: wrong number of channels; see also :func:`cenote.ops.pyramid.spatial_pyramid_pool`.
        """
        widths = {maps.shape[1]} if isinstance(maps, Tensor) else {item.shape[0] for item in maps}
        if widths - {self.dim}:
            raise ValueError(f"SPP was built for dim={self.dim}, got maps of {sorted(widths)} channels")
        return spatial_pyramid_pool(maps, self.levels, sizes, floor_at_zero=self.floor_at_zero)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor] | None = None, **config: Any) -> SPP:
        """With the official kernel's maxima from 0; there are no weights. ``config`` holds the options."""
        return cls(**{"floor_at_zero": True, **config})


def training_sizes(
    epochs: int, sizes: Sequence[int] = (224, 180), uniform: bool = False, seed: int = 0
) -> Iterator[int]:
    """Input side in pixels for each epoch of multi-size training: the paper keeps one size for a whole epoch.

    Args:
        epochs: how many sizes to give.
        sizes: taken in turn; with ``uniform`` the smallest and largest bound the draw.
        uniform: draw every epoch's size uniformly from the whole numbers between the bounds, both included.
        seed: of the draws.
    """
    if not len(sizes) or min(sizes) < 1:
        raise ValueError(f"sizes must be one or more positive numbers of pixels, got {list(sizes)}")
    draw = random.Random(seed)
    for epoch in range(epochs):
        yield draw.randint(min(sizes), max(sizes)) if uniform else sizes[epoch % len(sizes)]
