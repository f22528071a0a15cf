"""Attention with the second-order Taylor polynomial in place of the exponential."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.ops.causal_attention import all_real
from cenote.ops.heads import heads_of, merge_heads, num_heads_of
from cenote.ops.rotary import real_positions, rotate
from cenote.ops.taylor_attention import (
    TaylorState,
    initial_taylor_state,
    taylor_attention,
    taylor_attention_chunk,
    taylor_attention_map,
)


class TaylorAttention(RecurrentMixer):
    """``o_i = sum_j w_ij v_j / sum_j w_ij`` with ``w = 1 + s + s^2 / 2`` and ``s = q_i.k_j / sqrt(head_dim)``.

    *Approximate* of "Deconstructing Attention" (arXiv 2510.11602), after Based. The causal form runs in linear time on
    a state of ``1 + d + d (d + 1) / 2`` features a head. The paper's appendix divides each order of the polynomial by a
    normaliser of its own, which can vanish; here there is one for all.

    Args:
        dim: token width.
        num_heads: heads; ``dim`` must be divisible by it. 1 for each ``head_dim`` channels if that is given instead.
        head_dim: width of a head in place of ``num_heads``.
        causal: a token attends to itself and earlier ones only. Needed for chunks.
        form: ``"diagonal"`` keeps of the second order the squares alone: ``1 + 2 d`` features, as the appendix counts
            them. Its weights can be negative and are therefore no attention maps.
        eps: added to the normaliser.
        qkv_bias: bias of the query, key and value maps.
        proj_bias: bias of the output map.
        rope_theta: base of rotary positions; ``None`` for attention that does not know the order.

    Raises:
        ValueError: a width that the heads do not divide, an unknown form, a chunk without ``causal``.
    """

    name = "taylor_attention"
    paper = "deconstructing-attention"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        form: Literal["joint", "diagonal"] = "joint",
        eps: float = 0.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__(dim)
        if form not in ("joint", "diagonal"):
            raise ValueError(f"form must be 'joint' or 'diagonal', got {form!r}")
        self.num_heads, self.causal, self.form, self.eps = num_heads_of(dim, num_heads, head_dim), causal, form, eps
        self.rope_theta, self.permutation_equivariant = rope_theta, not causal and rope_theta is None
        self.attends = form == "joint"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def _heads(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (heads_of(x, self.num_heads) for x in self.qkv(tokens).chunk(3, dim=-1))
        if self.rope_theta is not None:
            positions = real_positions(all_real(tokens, mask), before)
            positions = positions if context.positions is None else context.positions
            query, key = (rotate(x, positions, self.rope_theta) for x in (query, key))
        return query, key, value

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._heads(tokens, mask, context)
        weights = None
        if self.causal and not return_weights:
            mixed, _ = taylor_attention_chunk(query, key, value, None, mask, form=self.form, eps=self.eps)
        else:
            mixed = taylor_attention(query, key, value, mask, causal=self.causal, form=self.form, eps=self.eps)
        if return_weights:
            weights = taylor_attention_map(query, key, mask, causal=self.causal, form=self.form, eps=self.eps)
        return self.proj(merge_heads(mixed)), weights

    def initial_state(self, tokens: Tensor) -> State:
        heads = heads_of(tokens, self.num_heads)
        return (*initial_taylor_state(heads, heads.shape[-1], self.form), tokens.new_zeros(len(tokens)).long())

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("attention that sees later tokens has no chunks: build it with causal=True")
        *past, count = state
        heads = self._heads(tokens, mask, context, count)
        mixed, after = taylor_attention_chunk(*heads, TaylorState(*past), mask, form=self.form, eps=self.eps)
        return self.proj(merge_heads(mixed)), (*after, count + all_real(tokens, mask).sum(dim=1))
