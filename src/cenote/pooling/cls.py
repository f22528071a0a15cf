"""The class token."""

from __future__ import annotations

from torch import Tensor

from cenote.ops.positions import first_real, take_token
from cenote.pooling.base import Pooling


class Cls(Pooling):
    """The first token, ``x_0``; no parameters.

    With a mask it is the first real token, the same thing for rows padded on the right and the class token still for
    rows padded on the left. Whether that token is a class token is the backbone's affair.
    """

    name = "cls"
    permutation_invariant = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return tokens[:, 0] if mask is None else take_token(tokens, first_real(mask)), None
