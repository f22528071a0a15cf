"""From hooked hidden states to :class:`~cenote.types.Features`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cenote.backbones.base import LayerReducer
from cenote.backbones.hooks import hidden_states
from cenote.types import Features, Grid


@dataclass
class Collector:
    """Takes hidden states as they come, reduces each at once where a reducer is given, and stacks what is left.

    Attributes:
        layers: wanted hidden states, in the order in which they are to be stacked (repeats allowed).
        mask: ``(batch, tokens)``, or ``None`` where every token is real.
        reduce: applied to each hidden state on arrival, so that the full one can be freed before the next is computed.
    """

    layers: tuple[int, ...]
    mask: Tensor | None
    reduce: LayerReducer | None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, number: int, hidden: Tensor) -> None:
        if number not in self.layers:
            return
        if self.mask is None:
            self.mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        self.kept[number] = hidden if self.reduce is None else self.reduce(hidden, self.mask.to(hidden.device))

    def features(self, grid: Grid | None, prefix: int, pooled: Tensor | None) -> Features:
        """What was collected; reduced rows have neither grid nor prefix, and an all-true mask."""
        # Blocks spread over several devices: the features live where the last of them was computed.
        device = self.kept[max(self.kept)].device
        hidden = torch.stack([self.kept[number].to(device) for number in self.layers], dim=1)
        if self.reduce is not None:
            rows = torch.ones(hidden.shape[0], hidden.shape[2], dtype=torch.bool, device=device)
            return Features(hidden, rows, self.layers, pooled=pooled)
        assert self.mask is not None
        return Features(hidden, self.mask.to(device), self.layers, grid, prefix, pooled)


def collect(
    run: Callable[[], tuple[Tensor, Tensor | None]],
    blocks: nn.ModuleList | nn.Sequential,
    layers: tuple[int, ...],
    reduce: LayerReducer | None,
    mask: Tensor | None = None,
    grid: Grid | None = None,
    prefix: int = 0,
) -> Features:
    """Run a network once and collect the wanted hidden states.

    Args:
        run: the forward pass; returns the last hidden state and the pooled output or ``None``.
        blocks: the network's blocks.
        layers: wanted hidden states, 0 to ``len(blocks)``.
        reduce: applied layer by layer as they come; with it nothing else is kept.
        mask: real tokens, ``(batch, tokens)``; ``None`` for all.
        grid: patch grid behind the prefix.
        prefix: non-patch tokens in front.
    """
    collector = Collector(layers, mask, reduce)
    with hidden_states(blocks, layers, collector):
        last, pooled = run()
    collector(len(blocks), last)
    return collector.features(grid, prefix, pooled)
