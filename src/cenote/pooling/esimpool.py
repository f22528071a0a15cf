"""ESimPool: SimPool without projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.masked import zero_padding
from cenote.ops.query_attention import shifted_power
from cenote.pooling.base import Prepared
from cenote.pooling.blocks import rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class ESimPool(CrossAttentionPooling):
    """Attention from the normalised mean token to the normalised tokens; the tokens themselves are the values.

    ``a_h = softmax_n(LN(mean(x))_h^T LN(x_n)_h / sqrt(head_dim))``, ``out = concat_h sum_n a_hn x_nh``, or with
    ``gamma`` the power mean ``(sum_n a_n (x_n - min(x) + 1e-6)^gamma)^(1/gamma)`` of
    :class:`~cenote.pooling.simpool.SimPool`. Source: the projection-free variant benchmarked by "Attention, Please!"
    (arXiv 2506.10178). Parameters: ``2 dim``. As in SimPool the official minimum is over the whole batch
    (``batch_minimum``). One effective query spans all channels for each head, which costs ``num_heads`` times the
    (tiny) arithmetic of the head-by-head form and buys the shared read.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        gamma: positive exponent of the power mean, ``None`` for the plain weighted sum.
        use_beta: add a learned scalar to the power mean.
        batch_minimum: the minimum over the whole batch, as published.
    """

    name = "esimpool"
    paper = "efficient-probing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        gamma: float | None = None,
        use_beta: bool = False,
        batch_minimum: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, num_queries=None, project="", norms=("qk",), eps=1e-6)
        if gamma is not None and not gamma > 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma, self.batch_minimum = gamma, batch_minimum
        self.beta = nn.Parameter(torch.zeros(1)) if use_beta and gamma is not None else None

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> Prepared:
        prepared = super().prepare(tokens, mask)
        if self.gamma is None:
            return prepared
        values = shifted_power(zero_padding(tokens, mask), self.gamma, mask, self.batch_minimum)
        return prepared._replace(values=values)

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        if self.gamma is None:
            return vectors
        mean = vectors.pow(1 / self.gamma)
        return (mean if self.beta is None else mean + self.beta).to(prepared.keys.dtype)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> ESimPool:
        """From official keys ``norm_patches`` and, with ``use_beta``, ``beta``."""
        config.pop("qkv_bias", None)
        pool = cls(**{"dim": state_dict["norm_patches.weight"].shape[0], "batch_minimum": True, **config})
        pool.load_state_dict(rename(state_dict, {"norm_patches": "norms.0", "beta": "beta"}))
        return pool
