"""Graphs of one part of a data set in memory, and batches of them laid end to end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.backbones.pyg import GraphNetwork
from cenote.data.base import Split


class GraphBatch(NamedTuple):
    """Graphs laid end to end: what nodes carry, edges among them, the graph of each node, and labels."""

    x: Tensor
    edge_index: Int[Tensor, "2 edges"]
    batch: Int[Tensor, "nodes"]
    targets: Int[Tensor, "graphs"]


class PackedGraphs:
    """One part of a data set in memory.

    ``x`` holds what nodes carry: features, or the hidden states of a frozen network.

    Args:
        split: of a set of graphs.
        device: where the graphs are held, and the batches taken.
    """

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        graphs = [split.items[number] for number in range(len(split))]
        self.x = torch.cat([graph.x for graph in graphs]).to(device)
        self.edges = torch.cat([graph.edge_index for graph in graphs], dim=1).to(device)
        self.nodes = torch.tensor([len(graph.x) for graph in graphs], device=device)
        self.links = torch.tensor([graph.edge_index.shape[1] for graph in graphs], device=device)
        self.targets = split.targets.to(device)

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Int[Tensor, "graphs"]) -> GraphBatch:
        """Some of the graphs."""
        index = index.to(self.nodes.device)
        nodes, links = self.nodes[index], self.links[index]
        rows, edges = _ranges(_starts(self.nodes)[index], nodes), _ranges(_starts(self.links)[index], links)
        shift = torch.repeat_interleave(_starts(nodes), links)
        owner = torch.repeat_interleave(torch.arange(len(index), device=index.device), nodes)
        return GraphBatch(self.x[rows], self.edges[:, edges] + shift, owner, self.targets[index])

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[GraphBatch]:
        """All graphs, shuffled where a generator (of the CPU, so that the order is the same everywhere) is given."""
        count = len(self)
        shuffled = generator is not None
        order = (
            torch.randperm(count, generator=generator, device="cpu") if shuffled else torch.arange(count, device="cpu")
        )
        for index in order.split(size):
            yield self.take(index)

    @torch.no_grad()
    def with_states(self, network: GraphNetwork, dtype: torch.dtype | None = None) -> PackedGraphs:
        """The same graphs carrying the network's hidden states, ``(nodes, layers + 1, dim)``, computed once."""
        packed = copy.copy(self)
        states = [network(batch.x, batch.edge_index).to(dtype) for batch in self.batches(256)]
        packed.x = torch.cat(states)
        return packed


def _starts(counts: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    return counts.cumsum(0) - counts


def _ranges(starts: Int[Tensor, "n"], counts: Int[Tensor, "n"]) -> Int[Tensor, "total"]:
    """``starts[i], starts[i] + 1, ...`` of ``counts[i]`` numbers, one range behind the other."""
    return torch.repeat_interleave(starts - _starts(counts), counts) + torch.arange(
        int(counts.sum()), device=counts.device
    )
