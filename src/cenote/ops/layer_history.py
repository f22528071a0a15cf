"""Mixing the layers of a history of hidden states by weights that its last layer asks for.

Layouts: states of nodes (tokens) of any leading axes with all their layers, ``(*nodes, layers, dim)``. Sums over so few
layers are products and sums of elements: as matrix products, one tiny pair a node, they take several times as long.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def layer_positions(layers: int, dim: int, device: torch.device | str | None = None) -> Float[Tensor, "{layers} {dim}"]:
    """Sine position vectors ``P[l, 2k] = sin(l / 10000^(2k/D))``, ``P[l, 2k+1] = cos(l / 10000^(2k/D))``.

    An odd ``dim`` ends with a sine that has no cosine beside it.
    """
    rates = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.arange(layers, device=device, dtype=torch.float32)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


def layer_scores(
    queries: Float[Tensor, "*nodes dim"], states: Float[Tensor, "*nodes layers dim"]
) -> Float[Tensor, "*nodes layers"]:
    """``c_{v,l} = q_v . x_{v,l}``: what each node's query finds in each of its layers."""
    return (queries.unsqueeze(-2) * states).sum(dim=-1)


def mix_layers(
    states: Float[Tensor, "*nodes layers dim"], weights: Float[Tensor, "*#nodes layers"]
) -> Float[Tensor, "*nodes dim"]:
    """``h_v = sum_l w_{v,l} x_{v,l}``; axes of length 1 in the weights are shared by all nodes along them."""
    return (states * weights.unsqueeze(-1)).sum(dim=-2)


def signed_weights(
    scores: Float[Tensor, "*batch layers"], eps: float = 1e-6
) -> tuple[Float[Tensor, "*batch layers"], Bool[Tensor, "*batch"]]:
    """Scores over their own sum, ``a_l = c_l / sum_l' c_l'``: weights that sum to one and may be negative or large.

    A sum that has nearly cancelled is kept ``eps`` times the mean ``|c|`` away from zero, on its side of it (zero
    counts as positive); the weights then sum to less than one. Scores that are all zero say nothing about the layers:
    every layer gets ``1/L``, which is the limit of equal scores.

    Multiplying the scores by any constant, a negative one too, changes nothing.

    Returns:
        The weights, and where the floor (or the rule for zeros) acted.

    Raises:
        ValueError: ``eps`` is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    silent = (scores == 0).all(dim=-1, keepdim=True)
    scores = torch.where(silent, torch.ones_like(scores), scores)
    total, floor = scores.sum(dim=-1, keepdim=True), eps * scores.abs().mean(dim=-1, keepdim=True)
    cancelled = total.abs() < floor
    total = torch.where(cancelled, torch.where(total < 0, -floor, floor), total)
    return scores / total, (cancelled | silent).squeeze(-1)
