"""A backbone and data whose features are known in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cenote.backbones.base import Backbone
from cenote.data.base import Split
from cenote.types import Features, Grid

DIM = 4


def hidden_of(item: str, layer: int) -> torch.Tensor:
    """What the fake backbone computes for one item, ``(tokens, DIM)``; an item is ``"<number> <token count>"``."""
    number, count = map(int, item.split())
    grid = torch.arange(count)[:, None] * DIM + torch.arange(DIM)
    return 100.0 * number + 1000.0 * layer + grid


class FakeBackbone(Backbone):
    """Text of any length, or images with a class token and a 2 x 3 grid.

    Args:
        side: where batches are padded.
        poison: ``(item number, layer, value)``, written into that item's second token.
    """

    num_layers = 3
    dim = DIM

    def __init__(self, modality="text", side="right", pooled=False, poison=None, weights="a0"):
        self.spec, self.modality, self.side, self.poison, self.weights = (
            f"fake:{modality}",
            modality,
            side,
            poison,
            weights,
        )
        self.pooled_dim = 2 if pooled else None
        self.module = torch.nn.Identity()
        if modality == "image":
            self.prefix, self.grid = 1, Grid(2, 3)
        self.calls = 0

    def collate(self, items: Sequence[str]) -> dict:
        return {"items": torch.tensor([[int(part) for part in item.split()] for item in items])}

    def encode(self, batch, layers, reduce):
        self.calls += 1
        items = [f"{number} {count}" for number, count in batch["items"].tolist()]
        counts = [int(item.split()[1]) for item in items]
        longest = max(counts)
        hidden = torch.full((len(items), len(layers), longest, DIM), 7e7)  # padding that must never be stored
        mask = torch.zeros(len(items), longest, dtype=torch.bool)
        for row, (item, count) in enumerate(zip(items, counts, strict=True)):
            place = slice(longest - count, None) if self.side == "left" else slice(0, count)
            mask[row, place] = True
            for slot, layer in enumerate(layers):
                hidden[row, slot, place] = hidden_of(item, layer)
                if self.poison and self.poison[:2] == (int(item.split()[0]), layer):
                    hidden[row, slot, place][1] = self.poison[2]
        pooled = None
        if self.pooled_dim:
            pooled = torch.tensor([[float(item.split()[0]), -1.0] for item in items])
        if reduce is not None:
            hidden = torch.stack([reduce(hidden[:, slot], mask) for slot in range(len(layers))], dim=1)
            return Features(
                hidden, torch.ones(hidden.shape[0], hidden.shape[2], dtype=torch.bool), layers, pooled=pooled
            )
        return Features(hidden, mask, layers, self.grid, self.prefix, pooled)

    def transform_id(self) -> str:
        return "identity"

    def fingerprint(self) -> str:
        return self.weights


def make_split(counts: Sequence[int], fingerprint: str = "d0") -> Split:
    items = [f"{number} {count}" for number, count in enumerate(counts)]
    return Split(
        items, torch.zeros(len(items), dtype=torch.int64), [f"item-{n}" for n in range(len(items))], fingerprint
    )


def naive(split: Split, indices, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow way to the same batch: hidden states and mask, padding zero."""
    rows = [torch.stack([hidden_of(split.items[i], layer) for layer in layers]) for i in indices]
    longest = max(row.shape[1] for row in rows)
    hidden = torch.zeros(len(rows), len(layers), longest, DIM)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for slot, row in enumerate(rows):
        hidden[slot, :, : row.shape[1]] = row
        mask[slot, : row.shape[1]] = True
    return hidden, mask
