"""Linear maps fitted by gradient descent with momentum, or with one gradient for a mini-batch of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cenote.mixing.base import State
from cenote.mixing.regressor import Gates, LinearRegressor
from cenote.ops.gates import LOG_DECAY, STEP, Gate
from cenote.ops.momentum_rule import chunk_mini_batch, chunk_momentum, step_momentum


class MomentumRegressor(LinearRegressor):
    """``Z = eta Z + beta k (v - S^T k)^T``, ``S = exp(g) S + Z`` (Titans' linear memory; its alpha is ``1 - exp(g)``).

    The gate ``momentum`` is ``log(eta)``. The state is ``S`` and ``Z``.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"g": LOG_DECAY, "momentum": LOG_DECAY, "beta": STEP}

    def initial_state(self, like: Tensor) -> State:
        return super().initial_state(like) * 2

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        rates = gates["beta"], gates["momentum"], gates["g"]
        return chunk_momentum(q, k, v, *rates, state, mask, chunk_size=self.chunk_size, scale=self.scale)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return step_momentum(q, k, v, gates["beta"], gates["momentum"], gates["g"], state, scale=self.scale)


class MiniBatchRegressor(LinearRegressor):
    """``S += sum_i beta_i k_i (v_i - S_0^T k_i)^T`` with ``S_0`` the state at the mini-batch's start (linear TTT).

    The state is ``S``, ``S_0`` and the tokens that the mini-batch has had, ``(batch, heads)``.

    Args:
        batch_tokens: tokens of a mini-batch, counted from the start of the sequence. Changes the result.

    Raises:
        ValueError: a mini-batch of fewer than one token.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"beta": Gate("head", "step")}

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, batch_tokens: int = 16, scale: float | None = None
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        super().__init__(num_heads, key_dim, value_dim, batch_tokens, scale)
        self.batch_tokens = batch_tokens

    def initial_state(self, like: Tensor) -> State:
        place = torch.zeros(like.shape[0], self.num_heads, dtype=torch.long, device=like.device)
        return (*super().initial_state(like) * 2, place)

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return chunk_mini_batch(q, k, v, gates["beta"], state, mask, batch_tokens=self.batch_tokens, scale=self.scale)
