"""What accompanies queries, keys and values in a recurrence (step sizes, decays), and the checks of all rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """One number a token, for each head or for each key feature of each head.

    Attributes:
        per: ``"head"`` for ``(batch, heads, tokens)``, ``"key"`` for ``(batch, heads, tokens, key_dim)``.
        range: ``"step"`` from 0 to 2, ``"unit"`` from 0 to 1, ``"log"`` the logarithm of a decay (at most 0, ``-inf``
            forgets everything), ``"positive"`` from 0, ``"real"`` anything.
        paired: there is one for each key and value instead of each query, where a token brings several pairs.
    """

    per: Literal["head", "key"] = "head"
    range: Literal["step", "unit", "log", "positive", "real"] = "step"
    paired: bool = False


STEP = Gate("head", "step", paired=True)
LOG_DECAY = Gate("head", "log")
KEY_LOG_DECAY = Gate("key", "log")
_BOUNDS = {"step": (0.0, 2.0), "unit": (0.0, 1.0), "log": (-torch.inf, 0.0), "positive": (0.0, torch.inf)}


def check_pairs(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Mapping[str, tuple[Gate, Tensor]],
    state: Iterable[Tensor] = (),
    pairs: int = 1,
) -> None:
    """Raise if the input of the rule ``kind`` does not fit together.

    Args:
        query: ``(batch, heads, tokens, key_dim)``.
        key: ``(batch, heads, pairs * tokens, key_dim)``.
        value: ``(batch, heads, pairs * tokens, value_dim)``.
        gates: each gate and its values by name.
        state: tensors of the state, each with batch and heads in front.
        pairs: keys and values that a token brings.

    Raises:
        ValueError: shapes that disagree, no token, a gate out of its range or a state that is not finite (numbers are
            looked at outside torch.compile only).
    """
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"{kind} expects queries, keys and values (batch, heads, tokens, head_dim), got {shapes}")
    batch, heads, tokens, width = query.shape
    rows = pairs * tokens
    if tokens == 0:
        raise ValueError(f"{kind} needs at least one token, got queries {tuple(query.shape)}")
    if tuple(key.shape) != (batch, heads, rows, width):
        raise ValueError(f"{kind} expects keys {(batch, heads, rows, width)}, got {tuple(key.shape)}")
    if tuple(value.shape[:3]) != (batch, heads, rows):
        raise ValueError(f"{kind} expects values {(batch, heads, rows)} and a width, got {tuple(value.shape)}")
    for name, (gate, numbers) in gates.items():
        expected = (batch, heads, rows if gate.paired else tokens, *((width,) if gate.per == "key" else ()))
        if tuple(numbers.shape) != expected:
            raise ValueError(f"{kind} expects {name} of shape {expected}, got {tuple(numbers.shape)}")
    state = tuple(state)
    for part in state:
        if tuple(part.shape[:2]) != (batch, heads):
            raise ValueError(f"{kind} expects a state of {(batch, heads)} and more axes, got {tuple(part.shape)}")
    if torch.compiler.is_compiling():
        return
    for name, (gate, numbers) in gates.items():
        if gate.range == "real":
            continue
        low, high = _BOUNDS[gate.range]
        least, most = (float(x) for x in numbers.detach().aminmax())
        if not (low <= least and most <= high):
            raise ValueError(f"{kind} expects {name} from {low:g} to {high:g}, got {least:g} to {most:g}")
    if not all(bool(part.isfinite().all()) for part in state):
        raise ValueError(f"{kind} was given a state that holds NaN or infinity")


def share_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head ``(batch, heads / n, ...)`` for the ``n`` consecutive query heads that share it.

    Raises:
        ValueError: query heads that the heads do not divide.
    """
    if x.shape[1] == heads:
        return x
    if heads % x.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {x.shape[1]} key and value heads evenly")
    return x.repeat_interleave(heads // x.shape[1], dim=1)
