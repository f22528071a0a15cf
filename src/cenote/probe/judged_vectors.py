"""Vectors of items by number, from stored features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pooling.base import Pooling
from cenote.probe.feed import Feed
from cenote.probe.fits import vectors
from cenote.probe.plan import Candidate
from cenote.probe.train import select_tokens
from cenote.types import Features


class Part(Feed):
    """Some items of a feed, with targets of their own.

    Args:
        whole: every item.
        items: numbers of those that belong to this part.
        targets: one each; zeros if not given.
    """

    def __init__(self, whole: Feed, items: Int[Tensor, "part"], targets: Tensor | None = None) -> None:
        self.whole, self.items = whole, items
        self.targets = torch.zeros(len(items), dtype=torch.int64) if targets is None else targets
        self.store, self.layers, self.device, self.held = whole.store, whole.layers, whole.device, whole.held

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: Tensor) -> tuple[Features, Tensor]:
        """Features and targets of the given members of the part, in that order."""
        return self.whole.take(self.items[index])[0], self.targets[index].to(self.device)


@dataclass(frozen=True)
class Vectors:
    """One vector for each of some items.

    Attributes:
        table: the vectors.
        place: row of each item of the data, -1 for those that have none.
    """

    table: Float[Tensor, "rows width"]
    place: Int[np.ndarray, "items"]

    def of(self, items: Int[np.ndarray, "some"]) -> Float[Tensor, "some width"]:
        """Vectors of items by number."""
        return self.table[torch.from_numpy(self.place[items])]


Read = Callable[[Features], Tensor]


def reader(pooling: nn.Module | None, candidate: Candidate | None, uniform: bool) -> Read:
    """What a readout (or, for ``None``, the encoder's own pooler) makes of a batch."""

    def read(features: Features) -> Tensor:
        if candidate is None:
            assert features.pooled is not None
            return features.pooled
        assert isinstance(pooling, Pooling)
        return pooling._pool(*select_tokens(features, candidate, uniform))[0]

    return read


def vectors_of(feed: Feed, items: Int[np.ndarray, "some"], read: Read, head: nn.Module | None = None) -> Vectors:
    """Vectors of some items, through ``head`` (a normalisation) where there is one.

    Raises:
        ValueError: vectors that are not finite.
    """
    wanted = np.unique(items)
    table = vectors(Part(feed, torch.from_numpy(wanted)), read)
    if head is not None:
        with torch.no_grad():
            table = head(table)
    broken = ~table.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(f"item {int(wanted[int(broken.nonzero()[0])])} has a vector that is not finite")
    place = np.full(len(feed), -1)
    place[wanted] = np.arange(len(wanted))
    return Vectors(table, place)


def standardisation(table: Float[Tensor, "items width"]) -> nn.BatchNorm1d:
    """Mean 0 and variance 1 over the given vectors, as a frozen batch norm; constant entries come out as 0."""
    norm = nn.BatchNorm1d(table.shape[1], eps=1e-6, affine=False)
    norm.running_mean.copy_(table.mean(dim=0))  # type: ignore[union-attr]
    norm.running_var.copy_(table.var(dim=0, correction=0))  # type: ignore[union-attr]
    return norm.eval()
