"""Batches of stored features for training and scoring."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cenote.probe.store import FeatureStore
from cenote.types import Features


class Feed:
    """One part of a data set as features and targets.

    A part that fits ``memory`` is held in RAM; a larger one is read from the store batch by batch, one batch ahead of
    the consumer, so that memory does not grow with the data.

    Args:
        store: the extracted features.
        targets: one an item.
        layers: hidden states to read.
        memory: bytes that may be held.
        device: where batches go.
    """

    def __init__(
        self, store: FeatureStore, targets: Tensor, layers: tuple[int, ...], memory: int = 2**30, device: str = "cpu"
    ) -> None:
        self.store, self.targets, self.layers, self.device = store, targets, layers, device
        size = 4 * store.dim * len(layers) * int(store.counts.sum())
        self.held = (
            store.batch(torch.arange(len(store)), layers).to(device) if store.uniform and size <= memory else None
        )

    def __len__(self) -> int:
        return len(self.store)

    def take(self, index: Tensor) -> tuple[Features, Tensor]:
        """Features and targets of the given items, in that order."""
        targets = self.targets[index].to(self.device)
        if self.held is None:
            return self.store.batch(index, self.layers).to(self.device), targets
        held = self.held
        pooled = None if held.pooled is None else held.pooled[index]
        return Features(held.hidden[index], held.mask[index], held.layers, held.grid, held.prefix, pooled), targets

    def batches(
        self, batch_size: int, seed: int | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Features, Tensor]]:
        """Batches in order, or shuffled by ``seed``."""
        order = torch.arange(len(self))
        if seed is not None:
            order = order[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]
        pieces = list(order.split(batch_size))
        if drop_last and len(pieces) > 1 and len(pieces[-1]) < batch_size:
            pieces.pop()
        if self.held is not None:
            yield from map(self.take, pieces)
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self.take, pieces[0])
            for piece in [*pieces[1:], None]:
                ready = ahead.result()
                if piece is not None:
                    ahead = reader.submit(self.take, piece)
                yield ready
