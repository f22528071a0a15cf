"""Pairs whose map is known, on which regressors can be compared: correlated keys, smooth maps, uneven keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.ops.delta_rule import chunk_delta_rule
from cenote.ops.local_regression import local_constant, local_polynomial
from cenote.ops.ridge_recurrence import ridge_recurrence

PAIRS, WIDTH = 128, 16
SCALES = tuple(2.0 ** (step / 2) for step in range(-2, 19))
"""Kernel scales that are tried, 0.5 to 512 in steps of the square root of 2."""


def correlated_keys(rho: float, maps: int, generator: torch.Generator) -> Tensor:
    """Unit keys along an AR(1) process, ``x_i = rho x_{i-1} + sqrt(1 - rho^2) noise``, ``(1, maps, pairs, width)``."""
    noise = torch.randn(PAIRS + 1, maps, WIDTH, generator=generator, dtype=torch.float64)
    now, keys = noise[0], []
    for fresh in noise[1:]:
        now = rho * now + (1 - rho**2) ** 0.5 * fresh
        keys.append(now)
    return F.normalize(torch.stack(keys, dim=1), dim=-1)[None]


def recall_errors(rho: float, seed: int, maps: int = 64) -> dict[str, float]:
    """Squared error of the prediction for random queries over that of predicting 0, after reading all pairs once.

    The values are a random linear map of the keys. Linear attention is read at the best scale there is, since it has
    none of its own.
    """
    g = torch.Generator().manual_seed(seed)
    keys = correlated_keys(rho, maps, g)
    truth = torch.randn(1, maps, WIDTH, WIDTH, generator=g, dtype=torch.float64)
    values = keys @ truth
    queries = torch.randn(1, maps, PAIRS, WIDTH, generator=g, dtype=torch.float64)
    wanted = queries @ truth

    def error(predicted: Tensor) -> float:
        return float((predicted - wanted).square().sum() / wanted.square().sum())

    linear = queries @ (keys.transpose(-1, -2) @ values)
    linear = linear * ((linear * wanted).sum() / linear.square().sum())
    steps = torch.ones(1, maps, PAIRS, dtype=torch.float64)
    delta = chunk_delta_rule(keys, keys, values, steps)[1]
    state = ridge_recurrence(keys, keys, values, 1e-3)[1]
    penalty = 1e-3 * torch.eye(WIDTH, dtype=torch.float64)
    ridge = torch.linalg.solve(state.gram + penalty, state.cross)
    return {"linear": error(linear), "delta": error(queries @ delta), "ridge": error(queries @ ridge)}


def smooth_map_errors(points: int, seed: int, maps: int = 8, queries: int = 64) -> dict[str, float]:
    """Mean squared error, over the values' variance, of local constant and local linear fits to a smooth map of the
    plane, each at the best of :data:`SCALES`. Keys and queries are uniform in a square."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(maps, 1, *shape, generator=g, dtype=torch.float64) * 4 - 2

    keys, asked = draw(points, 2), draw(queries, 2)
    waves = torch.randn(maps, 1, 2, 4, generator=g, dtype=torch.float64)
    phases = torch.pi * draw(1, 4)
    values, wanted = (torch.sin(x @ waves + phases) for x in (keys, asked))
    settings: dict[str, Any] = {"causal": False, "kernel": "gaussian"}

    def best(fit: Callable[[float], Tensor]) -> float:
        errors = [float((fit(scale) - wanted).square().mean() / wanted.var()) for scale in SCALES]
        return min(errors)

    return {
        "local constant": best(lambda s: local_constant(asked, keys, values, scale=s, **settings)),
        "local linear": best(lambda s: local_polynomial(asked, keys, values, scale=s, ridge=1e-4, **settings)),
    }


def uneven_key_errors(seed: int, points: int = 256, width: int = 3, spread: float = 0.6) -> dict[str, float]:
    """The same for a map of the keys' directions, whose lengths are log-normal: the kernel ``exp(s q.k)`` on the keys
    as they are and on normalised keys, each at its best scale."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(8, 1, *shape, generator=g, dtype=torch.float64)

    directions, asked = F.normalize(draw(points, width), dim=-1), F.normalize(draw(64, width), dim=-1)
    waves, phases = 2 * draw(width, 4), torch.pi * draw(1, 4)
    values, wanted = (torch.sin(x @ waves + phases) for x in (directions, asked))
    keys = directions * (spread * draw(points, 1)).exp()

    def best(keys: Tensor) -> float:
        fits = [local_constant(asked, keys, values, causal=False, scale=scale) for scale in SCALES]
        return min(float((fit - wanted).square().mean() / wanted.var()) for fit in fits)

    return {"raw keys": best(keys), "normalised keys": best(directions)}
