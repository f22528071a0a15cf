"""A frozen random matrix as a token mixer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.mixing.base import MapMixer
from cenote.ops.masked import widen
from cenote.ops.token_grid import flatten_map


class RandomMatrix(MapMixer):
    """``M(x) = softmax(R) x`` over the N cells of a map, R drawn once and frozen.

    Source: "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418); R is uniform between 0 and 1 as in
    the follow-up's code (which keeps ``softmax(R)`` in place of R, the frozen parameter ``scores`` ``(N, N)`` here). Of
    a masked map the softmax is over the real cells alone.

    Args:
        dim: channels.
        grid: height and width of the maps; others are refused.

    Raises:
        ValueError: a map of another size.
    """

    name = "random_matrix"
    paper = "poolformer"

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(dim)
        self.grid = (int(grid[0]), int(grid[1]))
        cells = self.grid[0] * self.grid[1]
        self.scores = nn.Parameter(torch.rand(cells, cells), requires_grad=False)

    def _mix_map(
        self, x: Float[Tensor, "batch dim height width"], keep: Bool[Tensor, "batch height width"] | None
    ) -> Tensor:
        flat = flatten_map("RandomMatrix", x, self.grid)
        scores = widen(self.scores)
        if keep is not None:
            scores = scores.masked_fill(~keep.flatten(1)[:, None], float("-inf"))
        weights = scores.softmax(dim=-1).to(x.dtype)
        return (flat @ weights.mT).unflatten(2, self.grid)

    def extra_repr(self) -> str:
        return f"grid={self.grid}"
