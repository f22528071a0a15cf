"""The attentive pooler of I-JEPA and V-JEPA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.pooling.base import Prepared
from cenote.pooling.blocks import MLP, Block, rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class JEPA(CrossAttentionPooling):
    """A transformer cross-attention block whose learned queries read the tokens.

    ``y = l + W_o concat_h sum_n softmax_n((W_q l + b_q)_h^T (W_k LN(x_n))_h / sqrt(head_dim)) (W_v LN(x_n) + b_v)_h +
    b_o``, ``out = y + MLP(LN(y))``, then ``depth - 1`` self-attention blocks among the queries, which do not read the
    tokens again. Source: V-JEPA (arXiv 2404.08471), in the form that "Attention, Please!" (arXiv 2506.10178)
    benchmarks. Parameters of the defaults: ``12 dim^2 + 14 dim``. Linear weights start truncated normal (0.02), those
    that end a residual branch divided by ``sqrt(2 layer)``. The key bias has no effect.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        depth: blocks, the reading one included.
        num_queries: learned queries; what they read is laid side by side, ``out_dim = num_queries * dim``.
        qkv_bias: bias of query, key and value projections.
    """

    name = "jepa"
    paper = "efficient-probing"
    query_parameters = ("queries",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        num_queries: int = 1,
        qkv_bias: bool = True,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        super().__init__(
            dim, num_heads, num_queries=num_queries, bias="qkvo" if qkv_bias else "o", norms=("kv",),
            init=lambda queries: nn.init.trunc_normal_(queries, std=0.02),
        )  # fmt: skip
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), MLP(dim, int(dim * mlp_ratio))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias) for _ in range(depth - 1))
        self._initialise()

    def _initialise(self) -> None:
        for name, linear in self.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            if name.endswith(("output_projection", ".proj", ".fc2")):
                layer = int(name.split(".")[1]) + 2 if name.startswith("blocks.") else 1
                with torch.no_grad():
                    linear.weight.div_((2.0 * layer) ** 0.5)

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        vectors = self.source(prepared) + vectors
        vectors = vectors + self.mlp(self.mlp_norm(vectors))
        for block in self.blocks:
            vectors = block(vectors)
        return vectors

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> JEPA:
        """From official keys ``query_tokens`` (1, queries, dim), ``cross_attention_block`` (``norm1``, ``xattn``,
        ``norm2``, ``mlp``) and ``blocks``.
        """
        state = dict(state_dict)
        queries = state["query_tokens"] = state["query_tokens"][0]
        if "embed_dim" in config:
            config["dim"] = config.pop("embed_dim")
        pool = cls(**{"dim": queries.shape[1], "num_queries": queries.shape[0], **config})
        block = "cross_attention_block"
        for kind in ("weight", "bias"):
            if f"{block}.xattn.kv.{kind}" in state:
                state[f"k.{kind}"], state[f"v.{kind}"] = state.pop(f"{block}.xattn.kv.{kind}").chunk(2)
        names = {
            "query_tokens": "queries", f"{block}.norm1": "norms.0", f"{block}.xattn.q": "query_projection",
            "k": "key_projection", "v": "value_projection", f"{block}.xattn.proj": "output_projection",
            f"{block}.norm2": "mlp_norm", f"{block}.mlp": "mlp", "blocks": "blocks",
        }  # fmt: skip
        pool.load_state_dict(rename(state, names))
        return pool
