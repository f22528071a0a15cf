"""Average pooling as a token mixer."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from cenote.mixing.base import MapMixer
from cenote.ops.box_mean import box_mean, require_odd


class Pool(MapMixer):
    """``M(x) = mean of the K x K window around a cell - x``, with no parameters.

    Only cells inside the map count (and, of a masked map, only real ones), so a constant map gives 0 everywhere. The
    ``- x`` takes the block's residual away: block and mixer together are a plain average pooling. Source: "MetaFormer
    Is Actually What You Need for Vision" (arXiv 2111.11418). The mask is an addition of this library; ``pool_size``
    must be odd, where the official code changes the size of the map without a word.

    Args:
        dim: channels.
        pool_size: side K of the window, odd.

    Raises:
        ValueError: an even or non-positive ``pool_size``.
    """

    name = "pool"
    paper = "poolformer"

    def __init__(self, dim: int, pool_size: int = 3) -> None:
        super().__init__(dim)
        require_odd(pool_size)
        self.pool_size = pool_size

    def _mix_map(
        self, x: Float[Tensor, "batch dim height width"], keep: Bool[Tensor, "batch height width"] | None
    ) -> Tensor:
        return box_mean(x, self.pool_size, keep) - x

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}"
