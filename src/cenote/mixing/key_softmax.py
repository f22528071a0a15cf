"""A running softmax mean whose weights ask no query."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.ops.heads import heads_of, merge_heads, num_heads_of
from cenote.ops.key_softmax import (
    initial_key_softmax_state,
    key_logits,
    key_softmax_chunk,
    key_softmax_weights,
)


class KeySoftmax(RecurrentMixer):
    """``o_i = sum_{j<=i} exp(l_j) v_j / sum_{m<=i} exp(l_m)`` with ``l_j = silu(W_q x_j).(W_k x_j) / sqrt(head_dim)``.

    *Non-approximate* of "Deconstructing Attention" (arXiv 2510.11602): the form of attention without its product of one
    token with another. Each head keeps a numerator, a denominator and the largest logit, whatever the length. Rotary
    positions would cancel. A stack of nothing but these diverges in training, the logits growing without bound, unless
    ``qk_norm`` holds them; between layers of softmax attention it does not.

    Args:
        dim: token width.
        num_heads: heads; ``dim`` must be divisible by it. 1 for each ``head_dim`` channels if that is given instead.
        head_dim: width of a head in place of ``num_heads``.
        bidirectional: each token gets the mean over all tokens of its item, which is then the same for all. Has to be
            asked for: a stack that is not causal does not switch it on.
        qk_norm: RMS norm of each head's queries (behind the SiLU) and keys.
        qkv_bias: bias of the query, key and value maps.
        proj_bias: bias of the output map.

    Raises:
        ValueError: a width that the heads do not divide; a chunk of the bidirectional form.
    """

    name = "key_softmax"
    attends = True
    paper = "deconstructing-attention"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        bidirectional: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        self.num_heads, self.causal = num_heads_of(dim, num_heads, head_dim), not bidirectional
        self.permutation_equivariant = bidirectional
        width = dim // self.num_heads
        self.query_norm, self.key_norm = (nn.RMSNorm(width) if qk_norm else nn.Identity() for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def _logits_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (heads_of(x, self.num_heads) for x in self.qkv(tokens).chunk(3, dim=-1))
        return key_logits(self.query_norm(F.silu(query)), self.key_norm(key)), value

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits, value = self._logits_values(tokens)
        if self.causal and not return_weights:
            return self.proj(merge_heads(key_softmax_chunk(logits, value, None, mask)[0])), None
        weights = key_softmax_weights(logits, mask, self.causal)
        return self.proj(merge_heads(weights.to(value.dtype) @ value)), weights if return_weights else None

    def initial_state(self, tokens: Tensor) -> State:
        return initial_key_softmax_state(heads_of(tokens, self.num_heads))

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        if not self.causal:
            raise ValueError("the bidirectional form sees later tokens and has no chunks")
        logits, value = self._logits_values(tokens)
        mixed, state = key_softmax_chunk(logits, value, state, mask)
        return self.proj(merge_heads(mixed)), state
