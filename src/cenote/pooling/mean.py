"""Mean over tokens."""

from __future__ import annotations

from torch import Tensor

from cenote.ops.masked import masked_mean
from cenote.pooling.base import Pooling


class Mean(Pooling):
    """The mean of the real tokens, ``1/n sum_n x_n``; no parameters."""

    name = "mean"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return masked_mean(tokens, mask), None
