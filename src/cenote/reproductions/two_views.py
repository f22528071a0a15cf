"""Embedding models trained so that two views of an item find each other among others, and how well they do."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.tuning.contrastive import info_nce

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""``draw(items, generator)`` gives two views of each of so many new items."""


def train_two_views(
    build: Callable[[], nn.Module],
    draw: Draw,
    seed: int,
    steps: int,
    lr: float = 2e-3,
    batch: int = 64,
    temperature: float = 0.05,
) -> nn.Module:
    """Train ``build()`` by InfoNCE on new items at every step (Adam, constant rate); returned in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        first, second = draw(batch, generator)
        loss = info_nce(model(first), model(second), temperature=temperature)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def retrieval(model: nn.Module, draw: Draw, seed: int, items: int, galleries: int = 8) -> float:
    """Share of first views whose nearest second view, of ``items``, is their own; mean over new galleries."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    shares = []
    for _ in range(galleries):
        first, second = (F.normalize(model(view), dim=-1) for view in draw(items, generator))
        nearest = (first @ second.T).argmax(dim=1)
        shares.append((nearest == torch.arange(items)).double().mean().item())
    return fmean(shares)
