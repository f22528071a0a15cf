"""A fully connected layer over positions as a token mixer."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.mixing.base import MapMixer
from cenote.ops.token_grid import flatten_map


class SpatialFC(MapMixer):
    """``M(x) = W x`` over the N cells of a map, the same ``W (N, N)`` for every channel and no bias.

    Source: "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418). The official layer takes any map with
    N cells; this one only maps of ``grid``, since cells of another shape mean something else. Cells outside a mask
    hold 0 and so add nothing.

    Args:
        dim: channels.
        grid: height and width of the maps; others are refused.

    Raises:
        ValueError: a map of another size.
    """

    name = "spatial_fc"
    paper = "poolformer"

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(dim)
        self.grid = (int(grid[0]), int(grid[1]))
        cells = self.grid[0] * self.grid[1]
        self.fc = nn.Linear(cells, cells, bias=False)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)

    def _mix_map(
        self, x: Float[Tensor, "batch dim height width"], keep: Bool[Tensor, "batch height width"] | None
    ) -> Tensor:
        return self.fc(flatten_map("SpatialFC", x, self.grid)).unflatten(2, self.grid)

    def extra_repr(self) -> str:
        return f"grid={self.grid}"
