"""Stochastic depth."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def drop_path(x: Float[Tensor, "batch *rest"], rate: float, training: bool) -> Float[Tensor, "batch *rest"]:
    """In training, an item is set to 0 with chance ``rate`` and scaled by ``1 / (1 - rate)`` otherwise."""
    if rate == 0 or not training:
        return x
    keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)
