"""Linear maps fitted by one gradient step from 0: linear attention and its decaying forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cenote.mixing.base import State
from cenote.mixing.regressor import Gates, LinearRegressor
from cenote.ops.chunks import CHUNK
from cenote.ops.gates import KEY_LOG_DECAY, LOG_DECAY
from cenote.ops.linear_recurrence import (
    FEATURE_CHUNK,
    add_normaliser,
    chunk_feature_decay,
    chunk_linear,
    divide_by_normaliser,
    elu_features,
    retention_log_decay,
    step_linear,
)


class LinearAttentionRegressor(LinearRegressor):
    """``S = S + phi(k) v^T``, ``o = scale S^T phi(q)``: least squares with ``K^T K`` taken for the identity.

    Args:
        feature_map: ``"identity"``, or ``"elu"`` for ``elu(x) + 1``.
        normalise: divide by ``phi(q) . sum phi(k)``, so that the output is a mean of values with positive weights;
            the state has one more column for it.

    Raises:
        ValueError: a normaliser without positive features, whose denominator could cross 0.
    """

    qk_norm = "none"

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        feature_map: str = "identity",
        normalise: bool = False,
        chunk_size: int = CHUNK,
        scale: float | None = None,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, chunk_size, scale)
        if feature_map not in ("identity", "elu"):
            raise ValueError(f"feature_map must be 'identity' or 'elu', got {feature_map!r}")
        if normalise and feature_map == "identity":
            raise ValueError("a normaliser needs positive features: feature_map='elu'")
        self.feature_map, self.normalise = feature_map, normalise

    def initial_state(self, like: Tensor) -> State:
        columns = self.value_dim + self.normalise
        return (like.new_zeros(like.shape[0], self.num_heads, self.key_dim, columns),)

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        return ("linear_attn", {"normalize": False}) if self.feature_map == "identity" else None

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        if self.feature_map == "elu":
            q, k = elu_features(q), elu_features(k)
            if mask is not None:  # the feature of a silent key is not 0
                k = k.masked_fill(~mask[:, None, :, None], 0.0)
        if self.normalise:
            v = add_normaliser(v)
        out, after = chunk_linear(q, k, v, None, state[0], chunk_size=self.chunk_size, scale=self.scale)
        return divide_by_normaliser(out) if self.normalise else out, (after,)


class ScalarDecayRegressor(LinearRegressor):
    """``S = exp(g) S + k v^T`` with one decay a head and token (Mamba-2, simple gated linear attention)."""

    gates: ClassVar[Mapping[str, Gate]] = {"g": LOG_DECAY}
    qk_norm = "none"

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        return "simple_gla", dict(gates)

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        out, after = chunk_linear(q, k, v, gates["g"], state[0], chunk_size=self.chunk_size, scale=self.scale)
        return out, (after,)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        out, after = step_linear(q, k, v, gates["g"], state[0], scale=self.scale)
        return out, (after,)


class RetentionRegressor(LinearRegressor):
    """``S = a_h S + k v^T`` with the constant decay ``a_h = 1 - 2^(-5 - h)`` of head h (RetNet)."""

    qk_norm = "none"

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        g = retention_log_decay(self.num_heads).to(q)[:, None].expand(q.shape[:3])
        if mask is not None:
            g = torch.where(mask[:, None], g, 0.0)
        out, after = chunk_linear(q, k, v, g, state[0], chunk_size=self.chunk_size, scale=self.scale)
        return out, (after,)


class VectorDecayRegressor(LinearRegressor):
    """``S = diag(exp(g)) S + k v^T`` with a decay for each key feature (GLA, RWKV-6, HGRN-2)."""

    gates: ClassVar[Mapping[str, Gate]] = {"g": KEY_LOG_DECAY}
    qk_norm = "none"

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, chunk_size: int = FEATURE_CHUNK, scale: float | None = None
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, chunk_size, scale)

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        return "gla", dict(gates)

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        out, after = chunk_feature_decay(q, k, v, gates["g"], state[0], chunk_size=self.chunk_size, scale=self.scale)
        return out, (after,)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        out, after = step_linear(q, k, v, gates["g"], state[0], scale=self.scale)
        return out, (after,)
