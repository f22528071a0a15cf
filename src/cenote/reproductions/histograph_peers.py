"""Readouts of PyTorch Geometric that HistoGraph is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cenote.ops.ragged import bucket_sets


class JumpingKnowledgeCat(nn.Module):
    """JumpingKnowledge-cat over the layers (without the input), then the mean over nodes."""

    def __init__(self, dim: int, states: int) -> None:
        super().__init__()
        from torch_geometric.nn import JumpingKnowledge, MeanAggregation

        self.jump, self.mean, self.out_dim = JumpingKnowledge("cat"), MeanAggregation(), dim * (states - 1)

    def forward(self, states: Tensor, batch: Tensor, size: int) -> Tensor:
        return self.mean(self.jump(list(states[:, 1:].unbind(1))), batch, dim_size=size)


class GraphMultiset(nn.Module):
    """GraphMultisetTransformer on the last layer, 8 representatives, 4 heads, layer norm."""

    def __init__(self, dim: int, states: int) -> None:
        super().__init__()
        from torch_geometric.nn import GraphMultisetTransformer

        self.aggregation, self.out_dim = GraphMultisetTransformer(dim, k=8, heads=4, layer_norm=True), dim

    def forward(self, states: Tensor, batch: Tensor, size: int) -> Tensor:
        return by_size(self.aggregation, states[:, -1], batch, size)


class SetTransformer(nn.Module):
    """SetTransformerAggregation on the last layer, one seed point, 4 heads, layer norm."""

    def __init__(self, dim: int, states: int) -> None:
        super().__init__()
        from torch_geometric.nn import SetTransformerAggregation

        self.aggregation, self.out_dim = SetTransformerAggregation(dim, heads=4, layer_norm=True), dim

    def forward(self, states: Tensor, batch: Tensor, size: int) -> Tensor:
        return by_size(self.aggregation, states[:, -1], batch, size)


def by_size(aggregation: Any, x: Tensor, batch: Tensor, size: int) -> Tensor:
    """An aggregation applied to graphs of similar size together, so that it pads little; the numbers are the same."""
    parts, order = [], []
    for sets, rows, mask in bucket_sets(batch, size):
        index = torch.repeat_interleave(torch.arange(len(sets)), mask.sum(dim=1))
        parts.append(aggregation(x[rows[mask]], index, dim_size=len(sets)))
        order.append(sets)
    pooled = torch.cat(parts)
    return pooled.new_zeros(size, pooled.shape[1]).index_copy(0, torch.cat(order), pooled)
