"""Linear maps fitted by stochastic gradient descent, a step or a few for each token: the delta rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cenote.mixing.base import State
from cenote.mixing.regressor import Gates, LinearRegressor
from cenote.ops.chunks import CHUNK
from cenote.ops.delta_rule import chunk_delta_rule, implicit_step, normalised_step, step_delta_rule
from cenote.ops.gates import LOG_DECAY, STEP, Gate


class DeltaRegressor(LinearRegressor):
    """``S = S + beta k (v - S^T k)^T`` (DeltaNet, fast weight programmers)."""

    gates: ClassVar[Mapping[str, Gate]] = {"beta": STEP}

    def steps(self, k: Tensor, gates: Gates) -> Tensor:
        """The step size of each pair, ``(batch, heads, pairs)``."""
        return gates["beta"]

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        return "delta_rule", {"beta": self.steps(k, gates)}

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        beta, size = self.steps(k, gates), self.chunk_size
        out, after = chunk_delta_rule(q, k, v, beta, gates.get("g"), state[0], chunk_size=size, scale=self.scale)
        return out, (after,)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        out, after = step_delta_rule(q, k, v, self.steps(k, gates), gates.get("g"), state[0], scale=self.scale)
        return out, (after,)


class GatedDeltaRegressor(DeltaRegressor):
    """``S' = exp(g) S``, ``S = S' + beta k (v - S'^T k)^T`` (Gated DeltaNet, Qwen3-Next)."""

    gates: ClassVar[Mapping[str, Gate]] = {"g": LOG_DECAY, "beta": STEP}

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        return "gated_delta_rule", dict(gates)


class GatedDeltaProductRegressor(GatedDeltaRegressor):
    """One decay, then ``num_updates`` delta steps for each token (Gated DeltaProduct). Queries are not scaled.

    Args:
        num_updates: keys and values that a token brings.

    Raises:
        ValueError: fewer than one update.
    """

    scaled = False

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_updates: int = 2,
        chunk_size: int = CHUNK,
        scale: float | None = None,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, chunk_size, scale)
        if num_updates < 1:
            raise ValueError(f"num_updates must be at least 1, got {num_updates}")
        self.pairs = num_updates

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        return "gated_delta_product", {**gates, "num_householder": self.pairs}


class LonghornRegressor(DeltaRegressor):
    """The exact minimum of ``|S - S_before|^2 + alpha |S^T k - v|^2``: a delta step ``alpha / (1 + alpha |k|^2)``.

    Queries are not scaled. Published as Longhorn with one step size for each feature of diagonal states; this is the
    same proximal step for a full state.
    """

    gates: ClassVar[Mapping[str, Gate]] = {"alpha": Gate("head", "positive", paired=True)}
    scaled = False

    def steps(self, k: Tensor, gates: Gates) -> Tensor:
        return implicit_step(k, gates["alpha"])


class NLMSRegressor(DeltaRegressor):
    """A delta step ``1 / (eps + |k|^2)``, the normalised least-mean-squares filter. Queries are not scaled.

    A key of 0 (padding) makes no step whatever its size.

    Args:
        eps: keeps the step finite for short keys.

    Raises:
        ValueError: ``eps`` not above 0.
    """

    gates: ClassVar[Mapping[str, Gate]] = {}
    scaled = False

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        eps: float = 1e-6,
        chunk_size: int = CHUNK,
        scale: float | None = None,
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim, chunk_size, scale)
        if eps <= 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.eps = eps

    def steps(self, k: Tensor, gates: Gates) -> Tensor:
        return normalised_step(k, self.eps)
