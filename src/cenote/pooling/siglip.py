"""The latent attention pooling of SigLIP's image encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.pooling.base import Prepared
from cenote.pooling.blocks import MLP, rename
from cenote.pooling.cross_attention import CrossAttentionPooling


class SigLIPPooling(CrossAttentionPooling):
    """Learned latents read the tokens by multi-head attention; an MLP with residual follows.

    ``y = W_o concat_h sum_n softmax_n((W_q l + b_q)_h^T (W_k x_n)_h / sqrt(head_dim)) (W_v x_n + b_v)_h + b_o``,
    ``out = y + MLP(y)``, of the first latent or the mean over latents. Source: SigLIP (arXiv 2303.15343), in the form
    (no norms) that "Attention, Please!" (arXiv 2506.10178) benchmarks. Parameters: ``12 dim^2 + 10 dim`` with one
    latent. The key bias has no effect and is there for the published weights.

    Args:
        dim: token width.
        num_heads: must divide ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        latent_len: number of latents.
        pool_type: ``"token"`` for the first latent, ``"avg"`` for the mean.
        qkv_bias: bias of query, key and value projections.
    """

    name = "siglip"
    paper = "efficient-probing"
    query_parameters = ("queries",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        latent_len: int = 1,
        pool_type: str = "token",
        qkv_bias: bool = True,
    ) -> None:
        if pool_type not in ("token", "avg"):
            raise ValueError(f"pool_type must be 'token' or 'avg', got {pool_type!r}")
        std = dim**-0.5
        super().__init__(
            dim, num_heads, num_queries=latent_len, bias="qkvo" if qkv_bias else "o",
            reduce="first" if pool_type == "token" else "mean",
            init=lambda latent: nn.init.trunc_normal_(latent, std=std, a=-2 * std, b=2 * std),
        )  # fmt: skip
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def complete(self, vectors: Tensor, prepared: Prepared) -> Tensor:
        return vectors + self.mlp(vectors)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> SigLIPPooling:
        """From official keys ``latent`` (1, latents, dim), ``q``, fused ``kv``, ``proj`` and ``mlp``."""
        state = dict(state_dict)
        latent = state["latent"] = state["latent"][0]
        if "in_features" in config:
            config["dim"] = config.pop("in_features")
        pool = cls(**{"dim": latent.shape[1], "latent_len": latent.shape[0], **config})
        for kind in ("weight", "bias"):
            if f"kv.{kind}" in state:
                state[f"k.{kind}"], state[f"v.{kind}"] = torch.chunk(state.pop(f"kv.{kind}"), 2)
        names = {
            "latent": "queries", "q": "query_projection", "k": "key_projection", "v": "value_projection",
            "proj": "output_projection", "mlp": "mlp",
        }  # fmt: skip
        pool.load_state_dict(rename(state, names))
        return pool
