"""Sequence layers as regression: at each token fit a map to the keys and values so far, answer the query with it.

A point of the grid is a choice of three: how the pairs are weighted, from which class the map is taken, and how it is
fitted. Source: "Test-time regression: a unifying framework for designing sequence models with associative memory"
(arXiv 2501.12352).
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cenote.integrations import fla
from cenote.mixing.base import State
from cenote.ops.chunks import CHUNK
from cenote.ops.gates import Gate, check_pairs, share_heads
from cenote.ops.masked import widen
from cenote.ops.padding_side import check_right_padding
from cenote.specs import check_options, unknown_name

Gates = Mapping[str, Tensor]


class Point(NamedTuple):
    """One point of the grid and the class that computes it, ``"file:name"`` under ``cenote.mixing``."""

    weights: str
    function: str
    optimiser: str
    entry_point: str


RULES: dict[str, Point] = {
    "linear_attention": Point("uniform", "linear", "one_step", "regressors_linear:LinearAttentionRegressor"),
    "retention": Point("fixed_decay", "linear", "one_step", "regressors_linear:RetentionRegressor"),
    "scalar_decay": Point("decay", "linear", "one_step", "regressors_linear:ScalarDecayRegressor"),
    "vector_decay": Point("feature_decay", "linear", "one_step", "regressors_linear:VectorDecayRegressor"),
    "delta_rule": Point("uniform", "linear", "sgd", "regressors_delta:DeltaRegressor"),
    "gated_delta": Point("decay", "linear", "sgd", "regressors_delta:GatedDeltaRegressor"),
    "gated_delta_product": Point("decay", "linear", "repeated_sgd", "regressors_delta:GatedDeltaProductRegressor"),
    "longhorn": Point("uniform", "linear", "implicit_sgd", "regressors_delta:LonghornRegressor"),
    "nlms": Point("uniform", "linear", "normalised_sgd", "regressors_delta:NLMSRegressor"),
    "momentum": Point("decay", "linear", "momentum_sgd", "regressors_momentum:MomentumRegressor"),
    "mini_batch": Point("uniform", "linear", "mini_batch_sgd", "regressors_momentum:MiniBatchRegressor"),
    "ridge": Point("decay", "linear", "exact", "regressors_ridge:RidgeRegressor"),
    "kernel_ridge": Point("uniform", "kernel", "exact", "regressors_ridge:KernelRidgeRegressor"),
    "local_constant": Point("local", "constant", "exact", "regressors_local:LocalConstantRegressor"),
    "local_linear": Point("local", "affine", "exact", "regressors_local:LocalLinearRegressor"),
    "parallax": Point("local", "affine", "learned", "regressors_local:ParallaxRegressor"),
    "taylor2": Point("local_taylor", "constant", "exact", "regressors_local:TaylorRegressor"),
    "ttt_mlp": Point("uniform", "mlp", "mini_batch_sgd", "regressors_mlp:MLPRegressor"),
    "titans_mlp": Point("decay", "mlp", "momentum_sgd", "regressors_mlp:TitansRegressor"),
}
"""Every rule by its name."""


def grid() -> dict[tuple[str, str, str], str]:
    """The name of each valid combination ``(weights, function, optimiser)``."""
    return {(point.weights, point.function, point.optimiser): name for name, point in RULES.items()}


def rule_name(rule: str | None = None, *, weights: str = "", function: str = "linear", optimiser: str = "") -> str:
    """The rule of that name, or the one at that point of the grid.

    Raises:
        ValueError: an unknown name, or a combination outside the grid (the message lists the grid).
    """
    if rule is not None:
        if rule not in RULES:
            raise unknown_name("rule", rule, RULES, RULES)
        return rule
    valid = grid()
    if (weights, function, optimiser) not in valid:
        listed = "; ".join(f"{', '.join(choice)} ({name})" for choice, name in valid.items())
        raise ValueError(
            f"no rule with weights={weights!r}, function={function!r}, optimiser={optimiser!r}; valid are {listed}"
        )
    return valid[weights, function, optimiser]


def regressor_class(rule: str) -> type[Regressor]:
    """The class behind a rule's name."""
    file, _, attribute = RULES[rule_name(rule)].entry_point.partition(":")
    return getattr(importlib.import_module(f"cenote.mixing.{file}"), attribute)


def create_regressor(rule: str, num_heads: int, key_dim: int, value_dim: int, **options: Any) -> Regressor:
    """Build a regressor from its rule's name.

    Raises:
        ValueError: an unknown rule, or an option that it does not take.
    """
    cls = regressor_class(rule)
    check_options(rule, cls, options)
    return cls(num_heads, key_dim, value_dim, **options)


class Regressor(nn.Module):
    """The arithmetic of one rule on queries, keys and values; the layer around it makes those and the gates.

    Three calls agree, as those of :class:`cenote.mixing.base.RecurrentMixer`: :meth:`parallel` from an empty past,
    :meth:`chunk` a stretch of any length behind a state, :meth:`step` a stretch of one token. A subclass implements
    :meth:`initial_state` and :meth:`_chunk`, and :meth:`_step` or :meth:`_parallel` where there is a shorter way; they
    are handed checked float32 (or float64) tensors with as many key, value and gate heads as query heads, outside
    autocast. Outputs and states are float32 or better whatever the input.

    Padding stands on the right (the layer moves it there) and is neutral: keys, values and gates are set to 0, which
    leaves a state with decays and steps as it was. A rule for which that is not neutral reads ``mask``.

    Attributes:
        gates: the gates it needs, by name: ``beta`` step size or weight of a pair, ``g`` log-decay, ``alpha`` strength
            of an implicit step, ``momentum``, ``r`` a learned direction.
        qk_norm: how the layer normalises queries and keys unless told otherwise.
        pairs: keys and values that a token brings; there are ``pairs * tokens`` of them, those of a token together.
        grows: whether the state gets longer with the sequence.
    """

    gates: ClassVar[Mapping[str, Gate]] = {}
    qk_norm: ClassVar[Literal["l2", "rms", "none"]] = "l2"
    pairs: int = 1
    grows: ClassVar[bool] = False

    def __init__(self, num_heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim

    def parallel(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Outputs of a whole sequence, ``(batch, heads, tokens, value_dim)``; see :meth:`chunk`."""
        return self._run(self._parallel, q, k, v, gates, None, mask)[0]

    def chunk(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None = None,
        state: State | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Outputs ``(batch, heads, tokens, value_dim)`` of a stretch of tokens and the state after it.

        Args:
            q: ``(batch, heads, tokens, key_dim)``.
            k: ``(batch, kv_heads, pairs * tokens, key_dim)``, where ``kv_heads`` divides ``heads``.
            v: ``(batch, kv_heads, pairs * tokens, value_dim)``.
            gates: those that :attr:`gates` names, each of as many heads as the keys or the queries.
            state: what the stretch before it gave; ``None`` is an empty past.
            mask: ``(batch, tokens)``, ``True`` for a real token; padding on the right.

        Raises:
            ValueError: shapes that disagree, no token, heads that do not divide, other gates than those needed or
                numbers out of their range, a state that is not finite, padding in front of a real token.
        """
        return self._run(self._chunk, q, k, v, gates, state, mask)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """The same for a stretch of one token: the shapes are those of :meth:`chunk` with ``tokens = 1``."""
        return self._run(self._step, q, k, v, gates, state, None)

    @abstractmethod
    def initial_state(self, like: Tensor) -> State:
        """The state of an empty past: a tuple of tensors, ``(batch, heads, ...)`` each, for the batch of ``like``.

        ``like`` is float32 or float64 and gives dtype and device.
        """

    @abstractmethod
    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """The arithmetic of :meth:`chunk`."""

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return self._chunk(q, k, v, gates, state, mask)

    def _parallel(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        return self._chunk(q, k, v, gates, state, mask)

    def _run(
        self,
        call: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates | None,
        state: State | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, State]:
        gates = {} if gates is None else gates
        if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)):
            shapes = [tuple(getattr(x, "shape", ())) for x in (q, k, v)]
            raise ValueError(f"{type(self).__name__} takes (batch, heads, tokens, head_dim) thrice, got {shapes}")
        if set(gates) != set(self.gates):
            raise ValueError(f"{type(self).__name__} needs the gates {sorted(self.gates)}, got {sorted(gates)}")
        heads, dtype = q.shape[1], v.dtype
        # Outside autocast, which would round the products of float32 tensors.
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = widen(q), share_heads(widen(k), heads), share_heads(widen(v), heads)
            gates = {name: share_heads(widen(gate), heads) for name, gate in gates.items()}
            described = {name: (self.gates[name], gate) for name, gate in gates.items()}
            empty = self.initial_state(q)
            state = empty if state is None else state
            check_pairs(type(self).__name__, q, k, v, described, state, self.pairs)
            given, expected = ([tuple(part.shape) for part in parts] for parts in (state, empty))
            if len(given) != len(expected) or not (self.grows or given == expected):
                raise ValueError(f"{type(self).__name__} expects a state of shapes {expected}, got {given}")
            if mask is not None:
                k, v, gates = self._silence(k, v, gates, mask)
            fast = None if call == self._step else self._accelerated(q, k, v, gates, state, dtype)
            return call(q, k, v, gates, state, mask) if fast is None else fast

    def _accelerated(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, dtype: torch.dtype
    ) -> tuple[Tensor, State] | None:
        """What another library's kernel gives for input that came in ``dtype``; ``None`` where there is none."""
        return None

    def _silence(self, k: Tensor, v: Tensor, gates: Gates, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keys, values and gates with 0 at padding."""
        check_right_padding(type(self).__name__, mask, k.shape[2] // self.pairs)
        rows = mask.repeat_interleave(self.pairs, dim=1)[:, None]

        def silent(name: str, gate: Tensor) -> Tensor:
            keep = rows if self.gates[name].paired else mask[:, None]
            return gate.masked_fill(~(keep.unsqueeze(-1) if gate.ndim == 4 else keep), 0.0)

        k, v = (x.masked_fill(~rows.unsqueeze(-1), 0.0) for x in (k, v))
        return k, v, {name: silent(name, gate) for name, gate in gates.items()}


class LinearRegressor(Regressor):
    """A linear map ``S^T k`` fitted step by step; the state is ``S``, ``(batch, heads, key_dim, value_dim)``.

    Args:
        chunk_size: tokens whose steps are taken together; changes the speed only.
        scale: factor of the queries; ``None`` for the published one, ``key_dim^-0.5`` unless the rule says 1.

    Raises:
        ValueError: a chunk size below 1.
    """

    scaled: ClassVar[bool] = True

    def __init__(
        self, num_heads: int, key_dim: int, value_dim: int, chunk_size: int = CHUNK, scale: float | None = None
    ) -> None:
        super().__init__(num_heads, key_dim, value_dim)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.chunk_size = chunk_size
        self.scale = (key_dim**-0.5 if self.scaled else 1.0) if scale is None else scale

    def initial_state(self, like: Tensor) -> State:
        return (like.new_zeros(like.shape[0], self.num_heads, self.key_dim, self.value_dim),)

    def _kernel(self, k: Tensor, gates: Gates) -> tuple[str, dict[str, Any]] | None:
        """A kernel of :mod:`cenote.integrations.fla` that computes the same, and its gates and settings."""
        return None

    def _accelerated(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, dtype: torch.dtype
    ) -> tuple[Tensor, State] | None:
        kernel = self._kernel(k, gates) if fla.usable(dtype, q.device) else None
        function = None if kernel is None else fla.find(kernel[0])
        if kernel is None or function is None:
            return None
        out, after = fla.run(function, q, k, v, kernel[1], state[0], self.scale, dtype)
        return out, (after,)
