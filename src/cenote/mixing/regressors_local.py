"""Regressors that weigh the pairs by their distance from the query: their state is the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cenote.mixing.base import State
from cenote.mixing.regressor import Gates, Regressor
from cenote.ops.gates import Gate
from cenote.ops.local_regression import Kernel, LocalSolver, local_constant, local_polynomial, parallax
from cenote.ops.taylor_attention import TaylorState, initial_taylor_state, taylor_attention, taylor_attention_chunk


class LocalRegressor(Regressor):
    """What the local regressors share: keys and values so far as the state.

    A subclass implements :meth:`_fit`.

    Args:
        scale: s of the kernel, ``key_dim ** -0.5`` by default.
    """

    qk_norm = "rms"
    grows = True

    def __init__(self, num_heads: int, key_dim: int, value_dim: int, scale: float | None = None) -> None:
        super().__init__(num_heads, key_dim, value_dim)
        self.scale = key_dim**-0.5 if scale is None else scale

    def initial_state(self, like: Tensor) -> State:
        batch, heads = len(like), self.num_heads
        keys, values = (like.new_zeros(batch, heads, 0, width) for width in (self.key_dim, self.value_dim))
        return keys, values, torch.zeros(batch, heads, 0, dtype=torch.bool, device=like.device)

    def _fit(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seen: Tensor | None) -> Tensor:
        """Outputs of the last queries of a sequence of pairs, of which those that are not ``seen`` are padding."""
        raise NotImplementedError

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        keys, values, seen = state
        first = keys.shape[2] == 0
        fresh = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask
        seen = torch.cat([seen, fresh[:, None].expand(q.shape[:3])], dim=2)
        keys, values = torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)
        # Without a past the padding stands on the right of all pairs, where no real query looks.
        return self._fit(q, keys, values, gates, None if first else seen), (keys, values, seen)


class LocalConstantRegressor(LocalRegressor):
    """Weighted mean of the values, softmax attention (Nadaraya-Watson); see
    :func:`cenote.ops.local_regression.local_constant`.

    Args:
        scale: s of the kernel, ``key_dim ** -0.5`` by default.
        kernel: ``"dot"`` or ``"gaussian"``; the same where keys are normalised.
    """

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, scale: float | None = None, kernel: Kernel = "dot"
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, scale)
        self.kernel: Kernel = kernel

    def _fit(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seen: Tensor | None) -> Tensor:
        return local_constant(q, k, v, seen, kernel=self.kernel, scale=self.scale)


class LocalLinearRegressor(LocalRegressor):
    """Value at the query of a plane (or a polynomial) fitted around it; see
    :func:`cenote.ops.local_regression.local_polynomial`.

    Args:
        scale: s of the kernel, ``key_dim ** -0.5`` by default.
        kernel: ``"dot"`` or ``"gaussian"``.
        ridge: penalty of the slope, above 0.
        degree: of the polynomial; above 1 for narrow keys only.
        solver: ``"direct"``, or ``"cg"`` with so many ``iterations``.

    Raises:
        ValueError: a ridge that is not above 0.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        scale: float | None = None,
        kernel: Kernel = "dot",
        ridge: float = 0.1,
        degree: int = 1,
        solver: LocalSolver = "direct",
        iterations: int = 8,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, scale)
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge}: the first tokens see too few pairs for a slope")
        self.kernel: Kernel = kernel
        self.settings: dict[str, Any] = {"ridge": ridge, "degree": degree, "solver": solver, "iterations": iterations}

    def _fit(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seen: Tensor | None) -> Tensor:
        return local_polynomial(q, k, v, seen, kernel=self.kernel, scale=self.scale, **self.settings)


class ParallaxRegressor(LocalRegressor):
    """Softmax attention with a learned slope ``r``; see :func:`cenote.ops.local_regression.parallax`.

    Args:
        scale: s of the kernel, ``key_dim ** -0.5`` by default; ``r`` is not scaled.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"r": Gate("key", "real")}

    def _fit(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, seen: Tensor | None) -> Tensor:
        return parallax(q, k, v, gates["r"], seen, scale=self.scale)


class TaylorRegressor(Regressor):
    """Weighted mean of the values with weights ``1 + s + s^2 / 2``, ``s = scale q.k`` (Based): the softmax's second
    order, with a state of fixed size; see :func:`cenote.ops.taylor_attention.taylor_attention`.

    Args:
        scale: ``key_dim ** -0.5`` by default.
        eps: added to the sum of the weights.
        chunk_size: tokens of a block.
    """

    qk_norm = "none"

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        scale: float | None = None,
        eps: float = 1e-6,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim)
        self.scale, self.eps, self.chunk_size = scale, eps, chunk_size

    def initial_state(self, like: Tensor) -> State:
        none = like.new_zeros(len(like), self.num_heads, 0, self.key_dim)
        return tuple(initial_taylor_state(none, self.value_dim))

    def _parallel(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return taylor_attention(q, k, v, mask, scale=self.scale, eps=self.eps), state

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        settings: dict[str, Any] = {"scale": self.scale, "eps": self.eps, "block": self.chunk_size}
        out, after = taylor_attention_chunk(q, k, v, TaylorState(*state), mask, **settings)
        return out, tuple(after)
