"""The attentive probe of the context autoencoder (CAE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cenote.pooling.blocks import rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class CAE(CrossAttentionPooling):
    """One learned query; query, keys and values each behind their own layer norm; no residual and no MLP.

    ``out = W_o concat_h sum_n softmax_n((W_q LN(l))_h^T (W_k LN'(x_n))_h / sqrt(head_dim)) (W_v LN''(x_n))_h + b_o``.
    Source: CAE (arXiv 2202.03026), in the form that "Attention, Please!" (arXiv 2506.10178) benchmarks. Parameters:
    ``4 dim^2 + 10 dim``, of which ``2 dim`` are a fourth norm that the published layer has and never uses. The query
    starts at zero, so attention starts uniform.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        qkv_bias: bias of query and value projections.
    """

    name = "cae"
    paper = "efficient-probing"
    query_parameters = ("queries",)

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False) -> None:
        super().__init__(dim, num_heads, bias="qvo" if qkv_bias else "o", norms=("q", "k", "v"))
        self.unused_norm = nn.LayerNorm(dim)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> CAE:
        """From official keys ``query_token`` (1, 1, dim), ``norm1_q``, ``norm1_k``, ``norm1_v``, ``norm2_cross`` and
        ``cross_attn``.
        """
        query = state_dict["query_token"][0]
        pool = cls(**{"dim": query.shape[1], **config})
        names = {
            "query_token": "queries", "norm1_q": "norms.0", "norm1_k": "norms.1", "norm1_v": "norms.2",
            "norm2_cross": "unused_norm",
            "cross_attn.q": "query_projection", "cross_attn.k": "key_projection", "cross_attn.v": "value_projection",
            "cross_attn.q_bias": "query_projection.bias", "cross_attn.v_bias": "value_projection.bias",
            "cross_attn.proj": "output_projection",
        }  # fmt: skip
        pool.load_state_dict(rename({**state_dict, "query_token": query}, names))
        return pool
