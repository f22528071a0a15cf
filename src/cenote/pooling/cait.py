"""The class attention of CaiT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.masked import zero_padding
from cenote.ops.query_attention import Read, attend
from cenote.pooling.base import Prepared, Query, QueryPooling
from cenote.pooling.blocks import MLP, rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class ClassAttention(CrossAttentionPooling):
    """One class-attention block: the given class token reads itself and the tokens, then passes an MLP.

    ``c += g_1 CA(LN([c; x]))``, ``c += g_2 MLP(LN(c))``.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, init_scale: float) -> None:
        super().__init__(
            dim, num_heads, num_queries=None, bias="qkvo" if qkv_bias else "o", norms=("qkv",), eps=1e-6, own_key=True
        )  # fmt: skip
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps=1e-6), MLP(dim, int(dim * mlp_ratio))
        self.scale_attention = nn.Parameter(torch.full((dim,), init_scale))
        self.scale_mlp = nn.Parameter(torch.full((dim,), init_scale))

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        vectors = self.given(prepared) + self.scale_attention * vectors
        return vectors + self.scale_mlp * self.mlp(self.mlp_norm(vectors))


class CaiT(QueryPooling):
    """A learned class token reads itself and the tokens through class-attention blocks with layer scale.

    ``c += g_1 CA(LN([c; x]))``, ``c += g_2 MLP(LN(c))``, ``iterations`` times, each with its own weights;
    ``out = LN(c)``. Source: CaiT (arXiv 2103.17239), in the form that "Attention, Please!" (arXiv 2506.10178)
    benchmarks. Parameters of the defaults: ``12 dim^2 + 18 dim``. The weights returned are those of the last block on
    the tokens; the share on the class token itself is what they lack to 1. Beyond one iteration the tokens are read
    again (:attr:`single_read` is ``False``). The key bias has no effect.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        iterations: number of blocks.
        mlp_ratio: hidden width of the MLP over ``dim``.
        init_scale: initial layer scale g_1 and g_2.
        qkv_bias: bias of query, key and value projections.
    """

    name = "cait"
    paper = "efficient-probing"
    query_parameters = ("queries",)
    blocks: Sequence[ClassAttention]

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        iterations: int = 1,
        mlp_ratio: float = 4.0,
        init_scale: float = 1e-5,
        qkv_bias: bool = True,
    ) -> None:
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        super().__init__(dim)
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim), std=0.02))
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            ClassAttention(dim, num_heads, mlp_ratio, qkv_bias, init_scale) for _ in range(iterations)
        )
        self.norm = nn.LayerNorm(dim)

    @property
    def single_read(self) -> bool:
        return len(self.blocks) == 1

    def prepare(self, tokens: Tensor, mask: Tensor | None) -> Prepared:
        normed = self.blocks[0].normalise(zero_padding(tokens, mask), mask)
        return Prepared(normed, normed, mask)

    def _with_class(self, prepared: Prepared) -> Prepared:
        return prepared if prepared.query_tokens is not None else prepared._replace(query_tokens=self.queries)

    def query(self, prepared: Prepared) -> Query:
        return self.blocks[0].query(self._with_class(prepared))

    def finish(self, read: Read, prepared: Prepared) -> Tensor:
        return self.norm(self.blocks[0].finish(read, self._with_class(prepared)))

    def _pool(
        self, tokens: Tensor, mask: Tensor | None, query_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        prepared = self._with_class(self.prepare(tokens, mask)._replace(query_tokens=query_tokens))
        for block in self.blocks:
            queries, bias, extra = block.query(prepared)
            read = attend(queries, prepared.keys, prepared.values, mask, bias, extra)
            vector = block.finish(read, prepared)
            prepared = prepared._replace(query_tokens=vector[:, None])
        return self.norm(vector), read.weights

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> CaiT:
        """From official keys ``cls_token`` (1, 1, dim), ``blocks_token_only.i`` (``norm1``, ``attn``, ``norm2``,
        ``mlp``, ``gamma_1``, ``gamma_2``) and ``norm``.
        """
        state = {**state_dict, "cls_token": state_dict["cls_token"][0]}
        config = {
            {"embed_dim": "dim", "mlp_ratio_clstk": "mlp_ratio"}.get(key, key): value for key, value in config.items()
        }
        pool = cls(**{"dim": state["cls_token"].shape[1], **config})
        names = {"cls_token": "queries", "norm": "norm"}
        for i in range(len(pool.blocks)):
            old, new = f"blocks_token_only.{i}", f"blocks.{i}"
            names |= {
                f"{old}.norm1": f"{new}.norms.0", f"{old}.norm2": f"{new}.mlp_norm", f"{old}.mlp": f"{new}.mlp",
                f"{old}.gamma_1": f"{new}.scale_attention", f"{old}.gamma_2": f"{new}.scale_mlp",
                f"{old}.attn.q": f"{new}.query_projection", f"{old}.attn.k": f"{new}.key_projection",
                f"{old}.attn.v": f"{new}.value_projection", f"{old}.attn.proj": f"{new}.output_projection",
            }  # fmt: skip
        pool.load_state_dict(rename(state, names))
        return pool
