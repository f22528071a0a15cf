"""Regressors that are solved anew at every token: ridge regression, and its kernel form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cenote.mixing.base import State
from cenote.mixing.regressor import Gates, Regressor
from cenote.ops.gates import LOG_DECAY, STEP, Gate
from cenote.ops.kernel_ridge import Kernel, KernelRidgeState, initial_kernel_ridge_state, kernel_ridge
from cenote.ops.ridge_recurrence import BLOCK, RidgeState, Solver, initial_ridge_state, ridge_recurrence


class RidgeRegressor(Regressor):
    """``o_t = C_t^T (A_t + diag(lambda))^-1 q_t`` with the decayed sums ``A`` of ``beta k k^T`` and ``C`` of
    ``beta k v^T`` (Mesa layer); see :func:`cenote.ops.ridge_recurrence.ridge_recurrence`.

    Args:
        ridge: where lambda, one a head and key feature, starts; above 0.
        learn_ridge: whether lambda is learned, by its logarithm.
        solver: ``"direct"`` or ``"cg"``, worth while from key widths of about 64 on.
        iterations: of ``"cg"``; the key width by default.
        chunk_size: tokens solved together.

    Raises:
        ValueError: a ridge that is not above 0.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"beta": STEP, "g": LOG_DECAY}
    qk_norm = "l2"

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        ridge: float = 1.0,
        learn_ridge: bool = True,
        solver: Solver = "direct",
        iterations: int | None = None,
        chunk_size: int = BLOCK,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim)
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be above 0, got {ridge}: without it the first tokens have no unique solution")
        self.log_ridge = nn.Parameter(torch.full((num_heads, key_dim), math.log(ridge)), requires_grad=learn_ridge)
        self.solver, self.iterations, self.chunk_size = solver, iterations, chunk_size

    def initial_state(self, like: Tensor) -> State:
        none = like.new_zeros(len(like), self.num_heads, 0, self.key_dim)
        return tuple(initial_ridge_state(none, self.value_dim))

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        settings: dict[str, Any] = {"solver": self.solver, "iterations": self.iterations, "block": self.chunk_size}
        ridge = self.log_ridge.to(q.dtype).exp()
        out, after = ridge_recurrence(q, k, v, ridge, gates["g"], gates["beta"], RidgeState(*state), **settings)
        return out, tuple(after)


class KernelRidgeRegressor(Regressor):
    """``o_t = V^T (G + lambda diag(1/beta))^-1 kappa(K, q_t)`` over the pairs so far ("intention"); see
    :func:`cenote.ops.kernel_ridge.kernel_ridge`. The state grows with the square of the tokens.

    Args:
        ridge: lambda, above 0.
        kernel: ``"gaussian"``, ``"dot"`` or ``"linear"``.
        scale: of the kernel; ``key_dim ** -0.5`` by default.

    Raises:
        ValueError: a ridge that is not above 0.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"beta": STEP}
    qk_norm = "rms"
    grows = True

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        ridge: float = 0.1,
        kernel: Kernel = "gaussian",
        scale: float | None = None,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim)
        if not 0 < ridge < math.inf:
            raise ValueError(f"ridge must be above 0, got {ridge}")
        self.ridge, self.kernel = ridge, kernel
        self.scale = key_dim**-0.5 if scale is None else scale

    def initial_state(self, like: Tensor) -> State:
        none = like.new_zeros(len(like), self.num_heads, 0, self.key_dim)
        return tuple(initial_kernel_ridge_state(none, self.value_dim))

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        past = KernelRidgeState(*state)
        out, after = kernel_ridge(q, k, v, self.ridge, gates["beta"], past, kernel=self.kernel, scale=self.scale)
        return out, tuple(after)
