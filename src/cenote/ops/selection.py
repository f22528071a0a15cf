"""Choosing what to attend to from scores: by number, by threshold, by mass."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def select_topk(
    scores: Float[Tensor, "*rows items"], k: int, allowed: Bool[Tensor, "*rows items"] | None = None
) -> Bool[Tensor, "*rows items"]:
    """``True`` for the ``k`` highest scores of each row among the allowed items, or for all of them where fewer are.

    Raises:
        ValueError: ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if allowed is not None:
        # A finite floor keeps an allowed -inf in front of what is not allowed.
        scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~allowed, float("-inf"))
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    chosen.scatter_(-1, scores.topk(min(k, scores.shape[-1]), dim=-1).indices, True)
    return chosen if allowed is None else chosen & allowed


def select_threshold(
    scores: Float[Tensor, "*rows items"],
    threshold: float,
    allowed: Bool[Tensor, "*rows items"] | None = None,
    keep_best: bool = True,
) -> Bool[Tensor, "*rows items"]:
    """``True`` for scores strictly above the threshold; with ``keep_best`` a row that has none keeps its best."""
    chosen = scores > threshold
    if allowed is not None:
        chosen &= allowed
    if keep_best:
        chosen |= select_topk(scores, 1, allowed) & ~chosen.any(dim=-1, keepdim=True)
    return chosen


def select_mass(shares: Float[Tensor, "*rows items"], mass: float, min_items: int = 1) -> Bool[Tensor, "*rows items"]:
    """The highest shares of each row, one more than those whose running sum stays at or below ``mass``.

    At least ``min_items`` are chosen. ``mass`` 1 chooses everything.

    Raises:
        ValueError: a mass outside (0, 1], or ``min_items`` below 1.
    """
    if not 0 < mass <= 1 or min_items < 1:
        raise ValueError(f"expected a mass in (0, 1] and min_items of at least 1, got {mass} and {min_items}")
    if mass == 1:
        return torch.ones(shares.shape, dtype=torch.bool, device=shares.device)
    order = shares.argsort(dim=-1, descending=True, stable=True)
    running = shares.gather(-1, order).cumsum(dim=-1)
    count = ((running <= mass).sum(dim=-1, keepdim=True) + 1).clamp(min=min_items)
    kept = torch.arange(shares.shape[-1], device=shares.device) < count
    return torch.zeros(shares.shape, dtype=torch.bool, device=shares.device).scatter_(-1, order, kept)
