"""Multi-head softmax self-attention: what every other mixer is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.ops.causal_attention import all_real, attend, visible
from cenote.ops.heads import merge_heads, num_heads_of
from cenote.ops.rotary import real_positions, rotate


class SoftmaxAttention(RecurrentMixer):
    """``softmax(Q K^T / sqrt(head_dim)) V`` for each head, then a linear map.

    Args:
        dim: token width.
        num_heads: heads; ``dim`` must be divisible by it. 1 for each ``head_dim`` channels if that is given instead.
        head_dim: width of a head in place of ``num_heads``.
        causal: a token attends to itself and earlier ones only. Needed for :meth:`chunk` and :meth:`step`, whose
            state is the keys and values so far.
        qkv_bias: bias of the query, key and value maps.
        proj_bias: bias of the output map.
        rope_theta: base of rotary positions; ``None`` for attention that does not know the order.

    Raises:
        ValueError: a width that the heads do not divide; a chunk of an attention that is not causal.
    """

    name = "softmax_attention"
    attends = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__(dim)
        self.num_heads, self.causal, self.rope_theta = num_heads_of(dim, num_heads, head_dim), causal, rope_theta
        self.permutation_equivariant = not causal and rope_theta is None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def _heads(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``(batch, heads, tokens, head_dim)``."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rope_theta is not None:
            positions = real_positions(all_real(tokens, mask), before)
            positions = positions if context.positions is None else context.positions
            query, key = (rotate(x, positions, self.rope_theta) for x in (query, key))
        return query, key, value

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._heads(tokens, mask, context)
        if self.causal and mask is None and not return_weights:
            return self._merge(F.scaled_dot_product_attention(query, key, value, is_causal=True)), None
        if self.causal:
            seen = visible(tokens.shape[1], mask, tokens.shape[1], True, tokens.device)
        else:
            seen = None if mask is None else mask[:, None, None]
        mixed, weights = attend(query, key, value, seen, return_weights)
        return self._merge(mixed), weights

    def _merge(self, heads: Tensor) -> Tensor:
        return self.proj(merge_heads(heads))

    def initial_state(self, tokens: Tensor) -> State:
        past = tokens.new_zeros(tokens.shape[0], self.num_heads, 0, self.dim // self.num_heads)
        return past, past, tokens.new_zeros(tokens.shape[0], 0, dtype=torch.bool)

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("attention that sees later tokens has no chunks: build it with causal=True")
        keys, values, real = state
        query, key, value = self._heads(tokens, mask, context, real.sum(dim=1))
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        real = torch.cat([real, all_real(tokens, mask)], 1)
        seen = visible(tokens.shape[1], real, keys.shape[2], True, tokens.device)
        mixed, _ = attend(query, keys.to(query.dtype), values.to(query.dtype), seen)
        return self._merge(mixed), (keys, values, real)
