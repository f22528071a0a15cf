"""Latent attention (NV-Embed)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import widen, zero_padding
from cenote.pooling.base import Pooling
from cenote.pooling.cross_block import LatentBlock, load_reference, read_reference


class LatentAttention(Pooling):
    """Tokens are re-expressed through a learned dictionary of latents, passed through an MLP, and averaged.

    With latents ``Z (r, d)``, ``[K V] = LN(Z) Wkv``: ``y_t = concat_h softmax(q_th K_h^T / sqrt(e)) V_h Wo + x_t``,
    ``o_t = (a_t * gelu(g_t)) W2 + b2 + y_t`` with ``[a_t g_t] = LN(y_t) W1 + b1``, and the mean of ``o_t`` over real
    tokens. Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models" (arXiv 2405.17428);
    the released layer has 512 latents, 8 heads of width ``dim = 4096``, and normalises its output.

    Otherwise than in the official code, with the same numbers: keys and values of the latents are computed once instead
    of once a sequence, projections are multiplied into them where that is cheaper (and kept between calls in eval mode
    without gradients), and ``W2`` is applied to the mean. A row without a real token is refused; officially it is NaN.
    Parameters: ``4 d h e + 3 ff_mult d^2 + r d`` and a few ``d``.

    Args:
        dim: token width d.
        num_latents: size r of the dictionary.
        num_heads: attention heads h.
        head_dim: width e of one head; ``None`` takes ``dim``, as released (not ``dim / num_heads``).
        normalize: scale the vector to unit length.
        ff_mult: the MLP's hidden width is ``ff_mult * dim``.
        chunk_tokens: without gradients, tokens (over the batch) processed at a time; bounds memory, not the result.
    """

    name = "latent_attention"
    paper = "nv-embed"

    def __init__(
        self,
        dim: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        normalize: bool = False,
        ff_mult: int = 4,
        chunk_tokens: int = 2048,
    ) -> None:
        super().__init__(dim)
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        self.block = LatentBlock(dim, num_latents, num_heads, dim if head_dim is None else head_dim, ff_mult)
        self.normalize, self.chunk_tokens = normalize, chunk_tokens

    def transform(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The tokens ``o_t`` before the mean: what the official layer returns when it is given no pool mask."""
        self.check(tokens, None)
        read = self.block.tokens_read(tokens)
        return (self.block.mlp_project(self.block.mlp_gate(read)) + read).to(tokens.dtype)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        batch, length, _ = tokens.shape
        tokens = zero_padding(tokens, mask)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            read, gated = self._sums(tokens, mask)
        else:
            step = max(1, self.chunk_tokens // max(batch, 1))
            masks = [None] * -(-length // step) if mask is None else mask.split(step, dim=1)
            parts = [self._sums(t, m) for t, m in zip(tokens.split(step, dim=1), masks, strict=True)]
            read, gated = (torch.stack(sums).sum(dim=0) for sums in zip(*parts, strict=True))
        count = length if mask is None else mask.sum(dim=1, keepdim=True)
        vector = self.block.mlp_project(gated / count) + read / count
        if self.normalize:
            vector = F.normalize(widen(vector), dim=-1)
        return vector.to(tokens.dtype), None

    def _sums(
        self, tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch hidden"]]:
        """Sums over real tokens of ``y_t`` and of the MLP's hidden state, in float32 or better."""
        read = self.block.tokens_read(tokens)
        gated = self.block.mlp_gate(read)
        if mask is not None:
            # Padding was set to 0 and is finite, so products mask it; in place for the widest tensor of the layer.
            read, gated = read * mask[..., None], gated.mul_(mask[..., None])
        return widen(read).sum(dim=1), gated.sum(dim=1)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> LatentAttention:
        """From official keys ``latents``, ``cross_attend_blocks.{0,1}.*``.

        ``config`` takes the official names ``num_cross_heads`` (8), ``output_normalize`` (true) and, checked against
        the weights, ``num_latents_value``, ``hidden_dim``, ``latent_dim``, ``cross_dim_head``; also ``chunk_tokens``.

        Raises:
            ValueError: ``latent_dim`` other than ``hidden_dim`` (the official layer swaps the two norms, so that it
                works only when they are equal), keys missing or left over, sizes that contradict the weights.
        """
        hidden_dim, latent_dim = config.get("hidden_dim"), config.get("latent_dim")
        if hidden_dim is not None and latent_dim is not None and hidden_dim != latent_dim:
            raise ValueError(f"latent_dim must equal hidden_dim, got {latent_dim} and {hidden_dim}")
        options = {"chunk_tokens": config.pop("chunk_tokens")} if "chunk_tokens" in config else {}
        normalize = config.pop("output_normalize", True)
        sizes, state = read_reference(state_dict, config.pop("num_cross_heads", 8))
        official = {"hidden_dim": "dim", "latent_dim": "dim", "num_latents_value": "num_latents"}
        for key, own in {**official, "cross_dim_head": "head_dim"}.items():
            if config.pop(key, None) not in (None, sizes[own]):
                raise ValueError(f"{key} contradicts the weights, which have {own} {sizes[own]}")
        if config:
            raise ValueError(f"unknown option(s) {', '.join(sorted(config))}")
        with torch.device("meta"):
            pool = cls(**sizes, normalize=normalize, **options)
        return load_reference(pool, state)
