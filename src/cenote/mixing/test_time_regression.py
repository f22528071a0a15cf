"""Test-time regression as a layer: projections, short convolutions and gates around any rule of the grid."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.mixing.base import MixerContext, RecurrentMixer, State
from cenote.mixing.regressor import create_regressor, regressor_class, rule_name
from cenote.ops.gates import Gate
from cenote.ops.masked import widen
from cenote.ops.padding_side import front_order, reorder, restore
from cenote.ops.short_convolution import short_convolution

_GRID_OPTIONS = ("rule", "weights", "function", "optimiser", "options")


class TestTimeRegression(RecurrentMixer):
    """Each token fits a map to the keys and values so far and reads it with its query.

    ``q, k, v = norm(silu(conv(x W)))``; gates from ``x``; ``o = rule(q, k, v, gates)``;
    ``y = (rmsnorm(o) * silu(x W_g)) W_o``. The rule is a point of the grid (weights of the pairs, class of functions,
    optimiser), see :data:`cenote.mixing.regressor.RULES`. Source: "Test-time regression" (arXiv 2501.12352), the layer
    around it as in flash-linear-attention, whose key names it has. Different from there: a query, key or value without
    a convolution is not passed through SiLU either, and padding on the left needs no unpacking.

    Args:
        dim: token width.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by as many consecutive query heads; all by default. Gates (and
            states) belong to query heads.
        head_dim: width of queries and keys; ``dim / num_heads`` by default.
        expand_v: width of values over that of keys.
        conv_size: tokens that the causal convolutions see.
        conv_on: which of ``"q"``, ``"k"``, ``"v"`` have a convolution, such as ``"k"``; ``""`` for none.
        qk_norm: ``"l2"`` for unit queries and keys, ``"rms"`` for norm ``sqrt(head_dim)``, ``"none"``; ``None`` for
            what the rule does best with.
        decay: of a head ``"softplus"`` ``g = -exp(A_log) softplus(x W + dt_bias)``, or ``"sigmoid"``
            ``g = logsigmoid(x W) / 16``; decays of key features are always the latter, of a map of rank 16.
        max_step: largest step size, 2 for steps that may turn a stored value round (negative eigenvalues).
        output_gate: multiply by ``silu(x W_g)``.
        output_norm: root-mean-square norm of each head's output.
        norm_eps: added to squares in the norms.
        rule: name of the rule, ``"gated_delta"`` unless the next three say otherwise.
        weights: weights of the pairs, in place of a name together with ``function`` (``"linear"`` by default) and
            ``optimiser`` (``"sgd"``).
        options: settings of the rule; named mixers (``DeltaRule``, ...) take them as their own.

    Raises:
        ValueError: heads that do not divide, an unknown rule or point of the grid (the message lists the valid ones),
            a rule by name and by its choices at once, settings out of range, padding between real tokens.
    """

    __test__ = False  # not a test, whatever its name begins with
    name = "test_time_regression"
    paper = "test-time-regression"
    fixed_rule: ClassVar[str | None] = None

    def __init_subclass__(cls, rule: str | None = None, **kwargs: Any) -> None:
        """A named mixer takes the layer's settings and its rule's as one list."""
        super().__init_subclass__(**kwargs)
        if rule is None:
            return
        cls.fixed_rule = cls.name = rule
        layer = dict(inspect.signature(TestTimeRegression.__init__).parameters)
        own = dict(inspect.signature(regressor_class(rule)).parameters)
        kept = [p for key, p in layer.items() if key not in ("self", *_GRID_OPTIONS)]
        more = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for key, p in own.items()
            if key not in ("num_heads", "key_dim", "value_dim")
        ]
        cls.__signature__ = inspect.Signature([*kept, *more])  # type: ignore[attr-defined]

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        conv_size: int = 4,
        conv_on: str = "qkv",
        qk_norm: str | None = None,
        decay: str = "softplus",
        max_step: float = 1.0,
        output_gate: bool = True,
        output_norm: bool = True,
        norm_eps: float = 1e-5,
        *,
        rule: str | None = None,
        weights: str | None = None,
        function: str | None = None,
        optimiser: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim)
        rule = _rule(self.fixed_rule, rule, weights=weights, function=function, optimiser=optimiser)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_heads={num_heads} query heads cannot share {kv_heads} key and value heads evenly")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}: give head_dim")
        if set(conv_on) - set("qkv") or conv_size < 1:
            raise ValueError(f"convolutions are on some of 'qkv' and of size 1 or more, got {conv_on!r} of {conv_size}")
        if qk_norm not in (None, "l2", "rms", "none") or decay not in ("softplus", "sigmoid"):
            raise ValueError(f"qk_norm is l2, rms or none and decay softplus or sigmoid, got {qk_norm!r} and {decay!r}")
        if not 0 < max_step <= 2:
            raise ValueError(f"max_step must lie in (0, 2], got {max_step}")
        key_dim = dim // num_heads if head_dim is None else head_dim
        value_dim = int(key_dim * expand_v)
        if key_dim < 1 or value_dim < 1 or value_dim != key_dim * expand_v:
            raise ValueError(f"heads are at least 1 wide and whole, got head_dim={key_dim}, expand_v={expand_v}")
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.max_step, self.norm_eps, self.decay = max_step, norm_eps, decay
        self.regressor = create_regressor(rule, num_heads, key_dim, value_dim, **options)
        self.qk_norm = self.regressor.qk_norm if qk_norm is None else qk_norm
        pairs = self.regressor.pairs
        widths = {"q": num_heads * key_dim, "k": pairs * kv_heads * key_dim, "v": pairs * kv_heads * value_dim}
        self.convolved = tuple(part for part in "qkv" if part in conv_on)
        for part, width in widths.items():
            self.add_module(f"{part}_proj", nn.Linear(dim, width, bias=False))
            if part in self.convolved:
                self.add_module(f"{part}_conv1d", nn.Conv1d(width, width, conv_size, groups=width, bias=False))
        for gate_name, gate in self.regressor.gates.items():
            self._add_gate(gate_name, gate)
        if output_gate:
            self.g_proj = nn.Linear(dim, num_heads * value_dim, bias=False)
        self.output_gate = output_gate
        self.o_norm = nn.RMSNorm(value_dim, eps=norm_eps) if output_norm else nn.Identity()
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)

    def _add_gate(self, name: str, gate: Gate) -> None:
        """The parameters behind a gate, under the names of flash-linear-attention where it has them."""
        heads = self.num_heads * (self.regressor.pairs if gate.paired else 1)
        if name == "g" and gate.per == "key":
            wide = nn.Linear(16, heads * self.key_dim)
            self.gk_proj = nn.Sequential(nn.Linear(self.dim, 16, bias=False), wide)
            nn.init.zeros_(wide.bias)
            return
        width = heads * (self.key_dim if gate.per == "key" else 1)
        self.add_module(_projection(name), nn.Linear(self.dim, width, bias=False))
        if name == "g" and self.decay == "softplus":
            # Decay rates spread up to 16 and time steps log-uniform from 0.001 to 0.1, as in Mamba-2.
            self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-3, 16).log())
            time = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_bias = nn.Parameter(time + (-torch.expm1(-time)).log())

    def _gate(self, name: str, gate: Gate, tokens: Tensor) -> Tensor:
        """``(batch, heads, tokens or pairs[, key_dim])`` in float32 or better."""
        keyed = name == "g" and gate.per == "key"
        raw = widen(self.gk_proj(tokens) if keyed else self.get_submodule(_projection(name))(tokens))
        if name == "g" and not keyed and self.decay == "softplus":
            raw = -widen(self.A_log).exp() * _softplus(raw + widen(self.dt_bias))
        elif gate.range == "log":
            raw = F.logsigmoid(raw) / (16 if name == "g" else 1)
        elif gate.range in ("step", "unit"):
            raw = raw.sigmoid() * (self.max_step if gate.range == "step" else 1)
        elif gate.range == "positive":
            raw = _softplus(raw)
        heads = _heads(raw, self.key_dim if gate.per == "key" else 1, self.regressor.pairs if gate.paired else 1)
        return heads if gate.per == "key" else heads.squeeze(-1)

    def _project(self, part: str, tokens: Tensor, past: Tensor | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries, keys or values ``(batch, tokens, width)``, and what their convolution must remember."""
        x = self.get_submodule(f"{part}_proj")(tokens)
        if part not in self.convolved:
            return x, x
        mixed, past = short_convolution(x, self._convolution(part).weight.to(x.dtype), past, counts)
        return F.silu(mixed), widen(past)

    def _convolution(self, part: str) -> nn.Conv1d:
        module = self.get_submodule(f"{part}_conv1d")
        assert isinstance(module, nn.Conv1d)
        return module

    def _normalise(self, x: Tensor) -> Tensor:
        if self.qk_norm == "none":
            return x
        wide = widen(x)
        square = wide.square()
        total = square.sum(-1, keepdim=True) if self.qk_norm == "l2" else square.mean(-1, keepdim=True)
        return wide * (total + 1e-6).rsqrt()

    def _run(self, tokens: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        """Outputs and the state after them; without a state before them, there is none after them either."""
        order = counts = None
        if mask is not None:
            order = front_order(type(self).__name__, mask)
            tokens, mask, counts = reorder(tokens, order), mask.gather(1, order), mask.sum(dim=1)
        pasts = dict(zip(self.convolved, state or (), strict=False))
        projected = {part: self._project(part, tokens, pasts.get(part), counts) for part in "qkv"}
        pairs = self.regressor.pairs
        q = self._normalise(_heads(projected["q"][0], self.key_dim))
        k = self._normalise(_heads(projected["k"][0], self.key_dim, pairs))
        v = _heads(projected["v"][0], self.value_dim, pairs)
        gates = {name: self._gate(name, gate, tokens) for name, gate in self.regressor.gates.items()}
        fitted: State = ()
        if state is None:
            out = self.regressor.parallel(q, k, v, gates, mask)
        elif tokens.shape[1] == 1 and mask is None:
            out, fitted = self.regressor.step(q, k, v, gates, state[len(pasts) :])
        else:
            out, fitted = self.regressor.chunk(q, k, v, gates, state[len(pasts) :], mask)
        out = self._read(out.transpose(1, 2), tokens)
        if order is not None:
            out = restore(out, order)
        return out, (*(projected[part][1] for part in self.convolved), *fitted)

    def _read(self, out: Tensor, tokens: Tensor) -> Tensor:
        """Norm, gate and output projection of ``(batch, tokens, heads, value_dim)``."""
        if isinstance(self.o_norm, nn.RMSNorm):
            scale = (out.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
            out = out * scale * widen(self.o_norm.weight)
        if self.output_gate:
            out = out * F.silu(widen(self.g_proj(tokens))).unflatten(-1, (self.num_heads, -1))
        return self.o_proj(out.flatten(2).to(tokens.dtype))

    def _mix(
        self, tokens: Tensor, mask: Tensor | None, context: MixerContext, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._run(tokens, None, mask)[0], None

    def initial_state(self, tokens: Tensor) -> State:
        like = widen(tokens)
        shapes = [self._convolution(part).weight.shape for part in self.convolved]
        pasts = (like.new_zeros(len(tokens), length - 1, width) for width, _, length in shapes)
        return (*pasts, *self.regressor.initial_state(like))

    def _chunk(self, tokens: Tensor, state: State, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, State]:
        return self._run(tokens, state, mask)

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> TestTimeRegression:
        """From the weights of a layer of flash-linear-attention that has the same names (DeltaNet, Gated DeltaNet).

        ``config`` holds the settings of this class; the width is read off ``q_proj.weight``.
        """
        mixer = cls(state_dict["q_proj.weight"].shape[1], **config)
        mixer.load_state_dict(state_dict)
        return mixer


def _rule(fixed: str | None, rule: str | None, **choices: str | None) -> str:
    """The name of the rule that is asked for: by the class, by name or by its choices."""
    chosen = {name: choice for name, choice in choices.items() if choice is not None}
    if (fixed is not None) + (rule is not None) + bool(chosen) > 1:
        raise ValueError("a rule is given once, by its name or by weights, function and optimiser")
    if chosen:
        return rule_name(**{"weights": "", "function": "linear", "optimiser": "sgd", **chosen})
    return rule_name(fixed or rule or "gated_delta")


def _projection(gate: str) -> str:
    """The name of a gate's linear map."""
    return {"beta": "b_proj", "g": "a_proj"}.get(gate, f"{gate}_proj")


def _softplus(x: Tensor) -> Tensor:
    """Not torch's own, whose gradient torch.compile gives other strides than it has, so that it fails behind heads."""
    return -F.logsigmoid(-x)


def _heads(x: Tensor, width: int, pairs: int = 1) -> Tensor:
    """``(batch, tokens, pairs * heads * width)`` to ``(batch, heads, tokens * pairs, width)``."""
    return x.unflatten(-1, (pairs, -1, width)).flatten(1, 2).transpose(1, 2)
