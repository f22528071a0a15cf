"""No mixing of tokens, with as many parameters as attention has."""

from __future__ import annotations

from torch import Tensor

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.mixing.feed_forward import FeedForward


class TokenMLP(RecurrentMixer):
    """``W_d (silu(W_g x) * W_u x)`` for each token by itself, as wide inside as makes attention's parameters.

    *MLP* of "Deconstructing Attention" (arXiv 2510.11602): what a stack can do when no token sees another. The inner
    width is the nearest to ``(4 dim^2 + biases) / (3 dim)``, about ``4 dim / 3``.

    Args:
        dim: token width.
        hidden: inner width in place of the matched one.
        qkv_bias: match an attention whose query, key and value maps have biases.
        proj_bias: match an attention whose output map has one.

    Raises:
        ValueError: an inner width below 1.
    """

    name = "token_mlp"
    permutation_equivariant = True
    paper = "deconstructing-attention"

    def __init__(self, dim: int, hidden: int | None = None, qkv_bias: bool = False, proj_bias: bool = True) -> None:
        super().__init__(dim)
        if hidden is None:
            hidden = max(1, round((4 * dim + 3 * qkv_bias + proj_bias) / 3))
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.mlp = FeedForward(dim, hidden, "swiglu")

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.mlp(tokens), None

    def initial_state(self, tokens: Tensor) -> State:
        return ()

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        return self.mlp(tokens), state
