"""Maximum over tokens."""

from __future__ import annotations

from torch import Tensor

from cenote.ops.masked import masked_max
from cenote.pooling.base import Pooling


class Max(Pooling):
    """The maximum of each channel over the real tokens, ``max_n x_nc``; no parameters."""

    name = "max"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return masked_max(tokens, mask), None
