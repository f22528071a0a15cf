"""SimPool: the mean of the tokens asks once, with query and key projections only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.masked import zero_padding
from cenote.ops.query_attention import attend, shifted_power
from cenote.pooling.base import Prepared
from cenote.pooling.blocks import rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class SimPool(CrossAttentionPooling):
    """Attention from the mean token to all tokens, values normalised but not projected.

    ``u = LN(x)``, ``a = softmax_n((W_q mean(x))^T W_k u_n / sqrt(head_dim))``, ``out = sum_n a_n u_n``; with
    ``gamma`` the power mean ``(sum_n a_n (u_n - min(u) + 1e-6)^gamma)^(1/gamma)``, the minimum over all channels of
    the item's real tokens. Source: "Keep It SimPool" (arXiv 2309.06891), in the form that "Attention, Please!" (arXiv
    2506.10178) benchmarks. Parameters: ``2 dim^2 + 2 dim``.

    The official code takes the minimum over the whole batch, so that an item's vector depends on its batch mates
    (``batch_minimum``), and leaves the heads of the power mean apart; here they are merged. With ``gamma`` the values
    depend on the norm's parameters, so the tokens cannot be shared between models (:attr:`single_read` is ``False``).

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        qkv_bias: bias of the two projections; that of the keys cancels.
        gamma: positive exponent of the power mean, ``None`` for the plain weighted sum.
        use_beta: add a learned scalar to the power mean.
        batch_minimum: the minimum over the whole batch, as published.
    """

    name = "simpool"
    paper = "efficient-probing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qkv_bias: bool = False,
        gamma: float | None = None,
        use_beta: bool = False,
        batch_minimum: bool = False,
    ) -> None:
        # A power of the normalised values leaves no affine part to fold, so with gamma the norm is the keys' alone.
        norms = ("kv",) if gamma is None else ("k",)
        super().__init__(
            dim, num_heads, num_queries=None, project="qk", bias="qk" * qkv_bias, norms=norms, eps=1e-6
        )  # fmt: skip
        if gamma is not None and not gamma > 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma, self.batch_minimum = gamma, batch_minimum
        self.beta = nn.Parameter(torch.zeros(1)) if use_beta and gamma is not None else None

    @property
    def single_read(self) -> bool:
        return self.gamma is None

    def _pool(
        self, tokens: Tensor, mask: Tensor | None, query_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.gamma is None:
            return super()._pool(tokens, mask, query_tokens)
        prepared = self.prepare(tokens, mask)._replace(query_tokens=query_tokens)
        values = shifted_power(self.norms[0](zero_padding(tokens, mask)), self.gamma, mask, self.batch_minimum)
        read = attend(self.query(prepared).queries, prepared.keys, values, mask)
        return self.finish(read, prepared), read.weights

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        if self.gamma is None:
            return vectors
        mean = vectors.pow(1 / self.gamma)
        return (mean if self.beta is None else mean + self.beta).to(prepared.keys.dtype)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> SimPool:
        """From official keys ``norm_patches``, ``wq``, ``wk`` and, with ``use_beta``, ``beta``."""
        pool = cls(**{"dim": state_dict["norm_patches.weight"].shape[0], "batch_minimum": True, **config})
        names = {"norm_patches": "norms.0", "wq": "query_projection", "wk": "key_projection", "beta": "beta"}
        pool.load_state_dict(rename(state_dict, names))
        return pool
