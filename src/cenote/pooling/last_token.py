"""The last token."""

from __future__ import annotations

from torch import Tensor

from cenote.ops.positions import last_real, take_token
from cenote.pooling.base import Pooling


class LastToken(Pooling):
    """The last real token, the only one that has seen the whole text in a causal model; no parameters.

    Found by the mask, so rows may be padded on either side.
    """

    name = "last_token"
    permutation_invariant = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        return tokens[:, -1] if mask is None else take_token(tokens, last_real(mask)), None
