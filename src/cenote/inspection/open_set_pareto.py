"""The generalised Pareto distribution, with which GHOST and PostMax turn a score into a probability."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def fit_pareto(values: Float[Tensor, "items"]) -> Float[Tensor, "three"]:
    """Maximum-likelihood shape, location and scale, float64, by :func:`scipy.stats.genpareto.fit`.

    Raises:
        ValueError: fewer than two values, or all of them equal.
    """
    from scipy.stats import genpareto

    if len(values) < 2 or not values.max() > values.min():
        raise ValueError(f"a generalised Pareto needs two different values at least, got {len(values)} value(s)")
    return torch.tensor(genpareto.fit(values.double().cpu().numpy()), dtype=torch.float64)


def pareto_cdf(values: Float[Tensor, "items"], parameters: Float[Tensor, "items three"]) -> Float[Tensor, "items"]:
    """``1 - (1 + c z)^(-1/c)`` with ``z = (x - loc) / scale``; 0 left of the support, 1 right of it.

    ``parameters`` holds shape c, location and scale of each item's distribution. ``c = 0`` is the exponential.
    """
    shape, location, scale = parameters.double().unbind(dim=-1)
    z = ((values.double() - location) / scale).clamp_min(0)
    safe = torch.where(shape == 0, torch.ones_like(shape), shape)
    power = (1 + safe * z).clamp_min(0).log() / safe  # log 0 is -inf; a negative shape makes it +inf, so the CDF is 1
    return -torch.expm1(-torch.where(shape == 0, z, power))
