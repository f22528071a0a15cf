"""Attention that asks and answers with the token embeddings at every depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.ops.causal_attention import all_real, attend, visible
from cenote.ops.heads import heads_of, merge_heads, num_heads_of
from cenote.ops.masked import zero_padding
from cenote.ops.rotary import real_positions, rotate


class StaticAttention(RecurrentMixer):
    """``softmax(Q K^T / sqrt(head_dim)) V`` with ``Q = W_q e, K = W_k e`` from the embeddings e and ``V = W_v x``.

    *StaticEmbQK* of "Deconstructing Attention" (arXiv 2510.11602): which token looks at which does not depend on the
    depth, so that the maps of all layers can be known before the first one runs.

    Args:
        dim: token width.
        num_heads: heads; ``dim`` must be divisible by it. 1 for each ``head_dim`` channels if that is given instead.
        head_dim: width of a head in place of ``num_heads``.
        causal: a token attends to itself and earlier ones only. Needed for chunks, whose state is keys and values.
        static_norm: the embeddings pass a layer norm of this mixer's own first. Without (the paper's equation),
            embeddings of standard deviation 0.02 give nearly flat maps. (In the language model
            :class:`cenote.integrations.deconstructed_qwen2.DeconstructedQwen2ForCausalLM` it is the layer's input
            norm, which a mixer does not see.)
        qkv_bias: bias of the query, key and value maps.
        proj_bias: bias of the output map.
        rope_theta: base of rotary positions; ``None`` for attention that does not know the order.

    Raises:
        ValueError: a width that the heads do not divide; embeddings of another shape than the tokens; a chunk without
            ``causal``.
    """

    name = "static_attention"
    needs = frozenset({"embeddings"})
    attends = True
    paper = "deconstructing-attention"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        static_norm: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__(dim)
        self.num_heads, self.causal, self.rope_theta = num_heads_of(dim, num_heads, head_dim), causal, rope_theta
        self.permutation_equivariant = not causal and rope_theta is None
        self.static_norm = nn.LayerNorm(dim) if static_norm else nn.Identity()
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def check(self, tokens: Tensor, mask: Tensor | None, context: MixerContext) -> None:
        super().check(tokens, mask, context)
        assert context.embeddings is not None
        if context.embeddings.shape != tokens.shape:
            raise ValueError(
                f"{type(self).__name__} expects embeddings of the tokens' shape {tuple(tokens.shape)}, "
                f"got {tuple(context.embeddings.shape)}"
            )

    def _heads(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert context.embeddings is not None
        source = self.static_norm(zero_padding(context.embeddings, mask))
        query, key = (heads_of(x, self.num_heads) for x in self.qk(source).chunk(2, dim=-1))
        if self.rope_theta is not None:
            positions = real_positions(all_real(tokens, mask), before)
            positions = positions if context.positions is None else context.positions
            query, key = (rotate(x, positions, self.rope_theta) for x in (query, key))
        return query, key, heads_of(self.value(tokens), self.num_heads)

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        count = tokens.shape[1]
        seen = visible(count, mask, count, self.causal, tokens.device)
        mixed, weights = attend(*self._heads(tokens, mask, context), seen, return_weights)
        return self.proj(merge_heads(mixed)), weights

    def initial_state(self, tokens: Tensor) -> State:
        past = tokens.new_zeros(tokens.shape[0], self.num_heads, 0, self.dim // self.num_heads)
        return past, past, tokens.new_zeros(tokens.shape[0], 0, dtype=torch.bool)

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("attention that sees later tokens has no chunks: build it with causal=True")
        keys, values, real = state
        query, key, value = self._heads(tokens, mask, context, real.sum(dim=1))
        keys, values, real = (
            torch.cat([keys, key], 2),
            torch.cat([values, value], 2),
            torch.cat([real, all_real(tokens, mask)], 1),
        )
        seen = visible(tokens.shape[1], real, keys.shape[2], True, tokens.device)
        mixed, _ = attend(query, keys.to(query.dtype), values.to(query.dtype), seen)
        return self.proj(merge_heads(mixed)), (keys, values, real)
