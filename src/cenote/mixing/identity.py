"""No mixing at all: what the skeleton alone can do."""

from __future__ import annotations

from torch import Tensor

from cenote.mixing.base import MixerContext, RecurrentMixer, State


class Identity(RecurrentMixer):
    """``M(x) = x``. The block's residual stays, so a block with it doubles the normalised input."""

    name = "identity"
    projections = "none"
    permutation_equivariant = True
    paper = "poolformer"

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        return tokens, None

    def initial_state(self, tokens: Tensor) -> State:
        return ()

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        return tokens, state
