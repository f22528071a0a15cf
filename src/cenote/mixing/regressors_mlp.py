"""Regressors whose map is a small network, trained while the sequence is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from cenote.mixing.base import State
from cenote.mixing.regressor import Gates, Regressor
from cenote.ops.gates import LOG_DECAY, Gate
from cenote.ops.inner_mlp import InnerState, Weights, initial_inner_state, inner_mlp


class MLPRegressor(Regressor):
    """``f(x) = gelu(x W_1) W_2`` fitted by gradient steps on the pairs (TTT-MLP); see
    :func:`cenote.ops.inner_mlp.inner_mlp`.

    The weights that the network has before the first token are learned. The state is its weights, those at the start of
    the mini-batch, the momentum, and the tokens that the mini-batch has had.

    Args:
        hidden: inner width; four times the key width by default.
        batch_tokens: tokens of a mini-batch, counted from the start of the sequence. Changes the result.
        rate: largest step, which the gate ``beta`` is multiplied by.

    Raises:
        ValueError: a hidden width or a mini-batch below 1, a rate that is not above 0.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"beta": Gate("head", "unit")}
    qk_norm = "l2"

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        hidden: int | None = None,
        batch_tokens: int = 16,
        rate: float = 0.1,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim)
        hidden = 4 * key_dim if hidden is None else hidden
        if hidden < 1 or batch_tokens < 1 or not 0 < rate <= 2:
            raise ValueError(
                "expected a hidden width and a mini-batch of at least 1 and a rate above 0 and at most 2, got "
                f"hidden={hidden}, batch_tokens={batch_tokens}, rate={rate}"
            )
        self.batch_tokens, self.rate = batch_tokens, rate
        self.first = nn.Parameter(torch.randn(num_heads, key_dim, hidden) * key_dim**-0.5)
        self.second = nn.Parameter(torch.randn(num_heads, hidden, value_dim) * hidden**-0.5)

    def initial_state(self, like: Tensor) -> State:
        weights = Weights(self.first.to(like.dtype), self.second.to(like.dtype))
        now, start, speed, filled = initial_inner_state(weights, like.shape[0])
        return (*now, *start, *speed, filled)

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        past = InnerState(Weights(*state[:2]), Weights(*state[2:4]), Weights(*state[4:6]), state[6])
        rates = {"log_decay": gates.get("g"), "log_momentum": gates.get("momentum")}
        step = self.rate * gates["beta"]
        out, after = inner_mlp(q, k, v, step, past, **rates, mask=mask, batch_tokens=self.batch_tokens)
        return out, (*after.now, *after.start, *after.speed, after.filled)


class TitansRegressor(MLPRegressor):
    """The same with momentum and forgetting, ``Z = eta Z - beta grad``, ``W = exp(g) W + Z`` (Titans; its alpha is
    ``1 - exp(g)``). The gate ``momentum`` is ``log(eta)``."""

    gates: ClassVar[Mapping[str, Gate]] = {"beta": Gate("head", "unit"), "g": LOG_DECAY, "momentum": LOG_DECAY}
