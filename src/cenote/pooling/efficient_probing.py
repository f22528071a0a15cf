"""Efficient Probing (EP)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.query_attention import Read, project_pooled
from cenote.pooling.base import Prepared, Query, QueryPooling


class EfficientProbing(QueryPooling):
    """Learned queries attend to the tokens themselves and each pools its own slice of one value projection.

    ``a_m = softmax_n(q_m^T x_n / sqrt(dim))``, ``out = concat_m W_m sum_n a_mn x_n (+ b)``, with ``W_m`` the m-th
    group of rows of the value projection ``(dim / d_out, dim)``. Source: "Attention, Please! Revisiting Attentive
    Probing for Masked Image Modeling" (arXiv 2506.10178). The official layer projects every token before pooling;
    pooling first is the same function with about a tenth of the work. Parameters:
    ``num_queries * dim + dim * dim / d_out`` (+ ``dim / d_out`` with bias).

    Args:
        dim: token width D.
        num_queries: number M of learned queries; must divide ``dim / d_out``.
        d_out: output width is ``dim / d_out``; must divide ``dim``.
        qkv_bias: add a bias to the value projection.
    """

    name = "efficient_probing"
    paper = "efficient-probing"
    query_parameters = ("queries",)

    def __init__(self, dim: int, num_queries: int = 32, d_out: int = 1, qkv_bias: bool = False) -> None:
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}")
        if d_out < 1 or dim % d_out:
            raise ValueError(f"d_out must divide dim, got d_out={d_out} for dim={dim}")
        if (dim // d_out) % num_queries:
            raise ValueError(f"num_queries must divide dim / d_out = {dim // d_out}, got {num_queries}")
        super().__init__(dim, dim // d_out)
        self.queries = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))
        self.value = nn.Linear(dim, self.out_dim, bias=qkv_bias)

    def query(self, prepared: Prepared) -> Query:
        queries = self.queries if prepared.query_tokens is None else prepared.query_tokens
        if queries.shape[-2:] != self.queries.shape:
            raise ValueError(
                f"query_tokens must be (batch, {', '.join(map(str, self.queries.shape))}), got {tuple(queries.shape)}"
            )
        return Query(queries * self.dim**-0.5)

    def finish(self, read: Read, prepared: Prepared) -> Tensor:
        return project_pooled(read.pooled, self.value.weight, self.value.bias)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> EfficientProbing:
        """From official keys ``cls_token`` (1, M, D), ``v.weight`` and, with ``qkv_bias``, ``v.bias``."""
        queries = state_dict["cls_token"]
        config.pop("num_heads", None)
        pool = cls(**{"dim": queries.shape[-1], "num_queries": queries.shape[1], **config})
        state = {"queries": queries[0], "value.weight": state_dict["v.weight"]}
        if "v.bias" in state_dict:
            state["value.bias"] = state_dict["v.bias"]
        pool.load_state_dict(state)
        return pool
