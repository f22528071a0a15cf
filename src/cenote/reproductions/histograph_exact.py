"""HistoGraph: what holds exactly (reference tensors, symmetries, hand-set weights, frozen networks), and costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cenote.ops.layer_history import mix_layers, signed_weights
from cenote.pooling.histograph import HistoGraph
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.histograph_smoothing import WIDTH, PlainGCN, coloured_graphs

DIM, LAYERS = 16, 5


def exact_findings() -> list[Finding]:
    """Everything that needs no training and no clock."""
    return [
        *_golden(), *_graphs(), *_scores(), *_filter(), *_frozen(), *_costs(),
    ]  # fmt: skip


def _golden() -> list[Finding]:
    """No official code could be had: the reference file was computed from the formulas."""
    claim = "All outputs of the reference file, computed in float64 from the paper's formulas, are met."
    return [replace(found, claim=claim) for found in golden_findings("histograph")]


def readout(seed: int = 0, **options: Any) -> HistoGraph:
    """A readout with every parameter away from its start, in float64: only the algebra is in question."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = HistoGraph(DIM, **options).double()
        for parameter in pool.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return pool.eval()


def _noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def _graphs() -> list[Finding]:
    """Graphs of 1 to 9 nodes laid end to end in any order, and each by itself."""
    sizes = (5, 1, 9, 3)
    batch, history = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes)), _noise(18, LAYERS, DIM)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(2))
    pool, shared = readout(), readout(weights="batch")
    read, mixed_up = pool.read_graphs(history, batch), pool.read_graphs(history[order], batch[order])
    alone = torch.cat([pool.read_graphs(history[batch == g], batch[batch == g] * 0).graph for g in range(4)])
    paper = shared.read_graphs(history, batch).graph
    apart_alone = torch.cat([shared.read_graphs(history[batch == g], batch[batch == g] * 0).graph for g in range(4)])
    moved = _apart(paper, apart_alone)
    return [
        _at_most("Layer weights sum to 1.", _apart(read.layer_weights.sum(dim=1), torch.ones(4)), 1e-5),
        _at_most("Permuting the nodes leaves graph vectors as they are.", _apart(mixed_up.graph, read.graph), 1e-5),
        _at_most("Permuting the nodes permutes their states.", _apart(mixed_up.nodes, read.nodes[order]), 1e-5),
        _at_most(
            "A graph alone has the vector that it has in a batch.", _apart(alone, read.graph), 1e-5,
            note=f"With weights shared by the batch, as the paper's formula reads, it moves by {moved:.2g}.",
        ),
    ]  # fmt: skip


@torch.no_grad()
def _scores() -> list[Finding]:
    history, batch = _noise(12, LAYERS, DIM), torch.arange(12) // 6
    pool = readout()
    read, worst = pool.read_graphs(history, batch), 0.0
    for factor in (3.0, -1.0):
        scaled = readout()
        scaled.w_q.weight.mul_(factor)
        worst = max(worst, _apart(scaled.read_graphs(history, batch).graph, read.graph))
    still = readout(positions=False)
    same = still.read_graphs(history[:, :1].expand(-1, LAYERS, -1), batch)
    state = nn.functional.linear(history[:, 0], still.emb_hist.weight, still.emb_hist.bias)  # type: ignore[arg-type]
    one = pool.read_graphs(history[:, :1], batch)
    return [
        _at_most("Scaling the query projection by 3 or by -1 changes nothing.", worst, 1e-5),
        _at_most(
            "Equal states in all layers, without positions, get weights 1/L.",
            _apart(same.layer_weights, torch.full((2, LAYERS), 1 / LAYERS)), 1e-5,
        ),
        _at_most("Their mixture is that state.", _apart(same.mixed, state), 1e-5),
        _at_most("A single layer gets weight 1.", _apart(one.layer_weights, torch.ones(2, 1)), 1e-5),
    ]  # fmt: skip


def _filter() -> list[Finding]:
    history = _noise(7, LAYERS, DIM)
    scores = torch.tensor([0.0, 0, 0, -1, 2], dtype=torch.float64)
    mixed = mix_layers(history, signed_weights(scores)[0])
    wanted = 2 * history[:, -1] - history[:, -2]
    # A softmax mixes with positive weights that sum to 1, so it stays between its layers, channel by channel.
    low, high = history.amin(dim=1), history.amax(dim=1)
    outside = ((wanted < low) | (wanted > high)).double().mean()
    return [
        _at_most(
            "Scores (0, ..., -1, 2) give the filter 2 last - previous.", _apart(mixed, wanted), 1e-5,
            note=f"{100 * float(outside):.0f} % of its values lie outside of what any softmax over layers can reach.",
        ),
    ]  # fmt: skip


def _frozen() -> list[Finding]:
    """A readout trained on the history that a frozen network left in a cache."""
    x, adjacency, mask, _ = coloured_graphs(6, torch.Generator().manual_seed(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, pool = PlainGCN(4, glorot=True).requires_grad_(False), HistoGraph(WIDTH, 5)
    cached = network(x, adjacency)
    vector = pool(network(x, adjacency), mask)
    vector.square().sum().backward()
    with_gradient = sum(parameter.grad is not None for parameter in network.parameters())
    return [
        _at_most(
            "On a frozen network no gradient reaches the network.", float(with_gradient), 0.0,
            unit="parameters with a gradient",
        ),
        _at_most(
            "Its cached history gives the vectors of a fresh pass.",
            _apart(pool(cached, mask).detach(), vector.detach()), 0.0,
        ),
    ]  # fmt: skip


def work(layers: int, nodes: int) -> int:
    """Multiplications of one graph's vector, products of elements included."""
    with torch.device("meta"):
        pool, history = HistoGraph(64).requires_grad_(False), torch.empty(1, layers, nodes, 64)

    def elements(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * torch.Size(out_shape).numel()  # the counter's unit is two operations a multiplication

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mul: elements}) as counter:
        pool._pool(history, None)
    return counter.get_total_flops() // 2


def kept_numbers(layers: int, nodes: int) -> int:
    """Numbers that autograd keeps between the forward and the backward pass of one graph, each storage once."""
    pool, history = HistoGraph(64), torch.zeros(1, layers, nodes, 64)
    own = {parameter.untyped_storage().data_ptr() for parameter in pool.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vector = pool(history + 1.0)
    assert vector.requires_grad
    return sum(kept.values())


def _costs() -> list[Finding]:
    """Second and third differences: 0 for what is linear and quadratic."""
    by_layers = [work(layers, 20) for layers in (4, 8, 12)]
    by_nodes = [work(8, nodes) for nodes in (32, 64, 96, 128)]
    memory = [kept_numbers(layers, 20) for layers in (4, 8, 12)]
    second = [by_nodes[i] - 2 * by_nodes[i + 1] + by_nodes[i + 2] for i in (0, 1)]
    per_layer, joint = (by_layers[1] - by_layers[0]) / 4, 12 * 20
    every_pair = 4 * joint * 64 * 64 + 2 * joint * joint * 64
    return [
        _at_most(
            "Work is linear in the number of layers: its second difference is 0.",
            abs(by_layers[0] - 2 * by_layers[1] + by_layers[2]), 0.0, unit="multiplications",
            note=(
                f"A layer of 20 nodes of width 64 costs {per_layer:.0f} multiplications, where projecting it would "
                f"cost {2 * 20 * 64 * 64}: the projections are taken behind the sums over layers. Of 12 layers the "
                f"whole is {by_layers[2] / every_pair:.3f} of an attention among all "
                f"{joint} node-layer pairs."
            ),
        ),
        finding(
            "Work is quadratic in the number of nodes: its second difference is constant and positive.",
            "1",
            second[1] / second[0],
            lambda v: v == 1 and second[0] > 0,
            unit="ratio of second differences",
        ),
        _at_most(
            "What autograd keeps is linear in the number of layers.",
            abs(memory[0] - 2 * memory[1] + memory[2]), 0.0, unit="numbers",
            note=f"{(memory[1] - memory[0]) / 4:.0f} numbers a layer, where the history itself has {20 * 64}.",
        ),
    ]  # fmt: skip


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _at_most(claim: str, value: float, bound: float, note: str = "", unit: str = "max abs difference") -> Finding:
    expected = f"at most {bound:g}" if bound else "0"
    return finding(claim, expected, float(value), lambda v: v <= bound, unit=unit, note=note)
