"""Closed forms for in-context linear regression by one step of gradient descent, and by few attention heads.

Notation: d features, L pairs, label noise of variance s, ``x ~ N(0, I)`` and ``beta ~ N(0, I / d)``. Risks are mean
squared errors against the noisy label. From "In-Context Linear Regression Demystified" (arXiv 2503.12734), re-derived.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def _check(features: float, length: float, noise: float) -> None:
    if not (features > 0 and length > 0 and noise >= 0):
        raise ValueError(
            f"expected features > 0, length > 0 and noise >= 0, got features={features}, length={length}, noise={noise}"
        )


def debiased_step(features: int, length: int, noise: float) -> float:
    """Best step of the debiased gradient step, ``1 / (1 + (1 + s) d / L)``. Exact."""
    _check(features, length, noise)
    return 1 / (1 + (1 + noise) * features / length)


def debiased_risk(features: int, length: int, noise: float, step: float | None = None) -> float:
    """Risk of the debiased gradient step: ``s + 1 - 2 e (L-1)/L + e^2 (L-1)(L + d + s d)/L^2``. Exact.

    At the best step, the default, it is ``s + (d + 1 + s d) / (L + d + s d)``.
    """
    step = debiased_step(features, length, noise) if step is None else step
    _check(features, length, noise)
    kept = (length - 1) / length
    return noise + 1 - 2 * step * kept + step**2 * kept * (length + features + noise * features) / length


def plain_step(features: int, length: int, noise: float) -> float:
    """Best step of plain gradient descent, ``1 / (1 + (d + 1 + s d) / L)``. Exact."""
    _check(features, length, noise)
    return 1 / (1 + (features + 1 + noise * features) / length)


def plain_risk(features: int, length: int, noise: float, step: float | None = None) -> float:
    """Risk of the plain step, ``s + (1 - e)^2 + e^2 (d + 1 + s d) / L``; at the best step, the default, the linear
    attention's optimum ``s + (d + 1 + s d) / (L + d + 1 + s d)``. Exact."""
    step = plain_step(features, length, noise) if step is None else step
    _check(features, length, noise)
    return noise + (1 - step) ** 2 + step**2 * (features + 1 + noise * features) / length


def reduced_risk(
    mu: Float[Tensor, "heads"], omega: Float[Tensor, "heads"], features: int, length: int, noise: float
) -> Float[Tensor, ""]:
    """Risk of heads of scales omega (keys and queries) and mu (values), for long contexts.

    ``1 + s - 2 mu^T omega + mu^T (omega omega^T + ((1 + s) / L) exp(d omega omega^T)) mu``, exponential by entry.
    """
    _check(features, length, noise)
    pairs = omega[:, None] * omega
    quadratic = pairs + (1 + noise) / length * (features * pairs).exp()
    return 1 + noise - 2 * mu @ omega + mu @ quadratic @ mu


def opposite_heads_step(scale: float, features: int, length: int, noise: float) -> float:
    """Best effective step of two heads of scales ``+-scale``: ``1 / (1 + (1+s)(d/L) sinh(d g^2) / (d g^2))``."""
    _check(features, length, noise)
    argument = features * scale**2
    growth = math.sinh(argument) / argument if argument else 1.0
    return 1 / (1 + (1 + noise) * features / length * growth)


def one_head_scale(features: int) -> float:
    """Best scale omega of a single head for long contexts, ``1 / sqrt(d)``."""
    _check(features, 1, 0)
    return features**-0.5


def one_head_risk(features: int, length: int, noise: float) -> float:
    """Risk of the best single head for long contexts, ``s + c / (1 + c)`` with ``c = e (1 + s) d / L``.

    At finite length the risk is higher.
    """
    _check(features, length, noise)
    effective = math.e * (1 + noise) * features / length
    return noise + effective / (1 + effective)


def best_matrix(
    covariance: Float[Tensor, "features features"], length: int, noise: float
) -> Float[Tensor, "features features"]:
    """Best matrix of the debiased preconditioned step, ``(Sigma + ((tr Sigma + s d) / L) I)^(-1)``."""
    features = len(covariance)
    _check(features, length, noise)
    identity = torch.eye(features, dtype=covariance.dtype)
    return torch.linalg.inv(covariance + (covariance.trace() + noise * features) / length * identity)
