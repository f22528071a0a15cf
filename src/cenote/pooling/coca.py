"""The image attention pooling of CoCa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.pooling.base import Prepared
from cenote.pooling.blocks import rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class CoCa(CrossAttentionPooling):
    """Multi-query cross-attention: the first of many learned queries, many heads, one key and one value head.

    ``q = W_q LN(l_0)``, ``out = W_o concat_h sum_n softmax_n(q_h^T W_k x_n / sqrt(dim_head)) W_v x_n``, LN with a
    gain only, no biases. With ``parallel_ff`` a gated feed-forward of the query is added: ``W_2 (silu(g) * a)``,
    ``[a; g] = W_1 LN(l_0)``. Source: CoCa (arXiv 2205.01917), in the form that "Attention, Please!" (arXiv
    2506.10178) benchmarks. Parameters of the defaults: ``1349 dim``.

    The published layer evaluates all its queries and returns the first; only the first is evaluated here, so the others
    exist for the published weights alone and never receive a gradient.

    Args:
        dim: token width.
        heads: number of heads.
        dim_head: width of a head.
        num_img_queries: number of learned queries.
        norm_context: normalise the tokens too (gain only).
        parallel_ff: add the gated feed-forward.
        ff_mult: its hidden width over ``dim``.
    """

    name = "coca"
    paper = "efficient-probing"
    query_parameters = ("queries",)

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        num_img_queries: int = 196,
        norm_context: bool = False,
        parallel_ff: bool = False,
        ff_mult: int = 4,
    ) -> None:
        if heads < 1 or dim_head < 1:
            raise ValueError(f"heads and dim_head must be at least 1, got {heads} and {dim_head}")
        super().__init__(
            dim, heads, num_queries=num_img_queries, norms=("q", "kv") if norm_context else ("q",), norm_bias=False,
            reduce="first", head_dim=dim_head, shared_heads=True, init=nn.init.normal_,
        )  # fmt: skip
        self.ff_in = nn.Linear(dim, 2 * ff_mult * dim, bias=False) if parallel_ff else None
        self.ff_out = nn.Linear(ff_mult * dim, dim, bias=False) if parallel_ff else None

    def given(self, prepared: Prepared) -> Tensor:
        return super().given(prepared)[..., :1, :]

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        if self.ff_in is None or self.ff_out is None:
            return vectors
        value, gate = self.ff_in(self.source(prepared)).chunk(2, dim=-1)
        return vectors + self.ff_out(nn.functional.silu(gate) * value)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> CoCa:
        """From official keys ``img_queries``, ``norm.gamma``, ``to_q``, fused ``to_kv``, ``to_out`` and, by option,
        ``context_norm.gamma`` and ``ff``.

        The official norms also keep a constant zero ``beta``; ``ValueError`` if it is not zero.
        """
        state = dict(state_dict)
        for key in ("norm.beta", "context_norm.beta"):
            shift = state.pop(key, torch.zeros(1))
            if not shift.is_meta and bool(shift.any()):
                raise ValueError(f"{key} is a constant zero in CoCa, got {float(shift.abs().max()):.3g}")
        state["k.weight"], state["v.weight"] = state.pop("to_kv.weight").chunk(2)
        queries = state["img_queries"]
        pool = cls(**{"dim": queries.shape[1], "num_img_queries": queries.shape[0], **config})
        names = {
            "img_queries": "queries", "norm.gamma": "norms.0.weight", "context_norm.gamma": "norms.1.weight",
            "to_q": "query_projection", "k": "key_projection", "v": "value_projection", "to_out": "output_projection",
            "ff.0": "ff_in", "ff.2": "ff_out",
        }  # fmt: skip
        pool.load_state_dict(rename(state, names))
        return pool
