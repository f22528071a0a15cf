"""The attentive probe of AIM."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cenote.pooling.base import Prepared
from cenote.pooling.blocks import MaskedBatchNorm, rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class AIM(CrossAttentionPooling):
    """Learned queries, not projected, read batch-normalised tokens through key and value projections.

    ``u = BN(x)`` over all tokens of the batch, without affine part;
    ``out = mean_q concat_h sum_n softmax_n(q_h^T (W_k u_n)_h / sqrt(head_dim)) (W_v u_n)_h``. Source: AIM (arXiv
    2401.08541), in the form that "Attention, Please!" (arXiv 2506.10178) benchmarks. Parameters:
    ``2 dim^2 + num_queries dim``. Padding stays out of the batch statistics, which the official code does not know
    of.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        num_queries: learned queries; the output is the mean of what they read.
        qkv_bias: bias of key and value projections; that of the keys cancels.
    """

    name = "aim"
    paper = "efficient-probing"
    query_parameters = ("queries",)

    def __init__(self, dim: int, num_heads: int = 16, num_queries: int = 1, qkv_bias: bool = False) -> None:
        super().__init__(
            dim, num_heads, num_queries=num_queries, project="kv", bias="kv" * qkv_bias, reduce="mean",
            init=lambda queries: nn.init.normal_(queries, std=0.02),
        )  # fmt: skip
        self.batch_norm = MaskedBatchNorm(dim, eps=1e-6, affine=False)

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> Prepared:
        normed = self.batch_norm(tokens, mask)
        return Prepared(normed, normed, mask)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> AIM:
        """From official keys ``cls_token`` (1, queries, dim), ``k``, ``v`` and ``bn``."""
        queries = state_dict["cls_token"][0]
        pool = cls(**{"dim": queries.shape[1], "num_queries": queries.shape[0], **config})
        names = {"cls_token": "queries", "k": "key_projection", "v": "value_projection", "bn": "batch_norm"}
        pool.load_state_dict(rename({**state_dict, "cls_token": queries}, names))
        return pool
