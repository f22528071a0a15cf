"""HistoGraph against attention among all node-layer pairs, by the number of layers.

Time and what autograd keeps of one training step on graphs of 24 nodes, width 64. With L layers of N nodes HistoGraph
should grow with L, joint attention with L^2. The exponents are the slopes over the two largest numbers of layers, where
what does not depend on L weighs least; the ratio is joint attention's time over HistoGraph's at the most layers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from common import finish, interleaved, ratio
from torch import Tensor, nn

from cenote.pooling.histograph import HistoGraph

NODES, DIM, HEADS, GOAL = 24, 64, 4, 10.0


class JointAttention(nn.Module):
    """The same embedding, then multi-head self-attention among all node-layer pairs, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, history: Tensor) -> Tensor:
        pairs = self.embed(history).flatten(1, 2)
        return self.attention(pairs, pairs, pairs, need_weights=False)[0].mean(dim=1)


def kept_megabytes(model: nn.Module, history: Tensor) -> float:
    """What autograd keeps for the backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(history)
    del output
    return sum(kept.values()) / 2**20


def step(model: nn.Module, history: Tensor) -> Callable[[], Any]:
    def call() -> None:
        model.zero_grad()
        model(history).sum().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--graphs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    models = {"HistoGraph": HistoGraph(DIM, num_heads=HEADS).to(device), "joint attention": JointAttention().to(device)}
    rows: list[dict[str, Any]] = []
    value = 0.0
    for layers in options.layers:
        history = torch.randn(options.graphs, layers, NODES, DIM, device=device)
        times = interleaved({name: step(model, history) for name, model in models.items()}, options.repeats, warmup=2)
        row: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "layers": layers}
        for name, model in models.items():
            row[f"{name} ms"] = min(times[name]) * 1e3
            row[f"{name} kept MB"] = kept_megabytes(model, history)
            if rows:
                before = rows[-1]
                grown = math.log(layers / before["layers"])
                row[f"{name} time exponent"] = math.log(row[f"{name} ms"] / before[f"{name} ms"]) / grown
                row[f"{name} memory exponent"] = math.log(row[f"{name} kept MB"] / before[f"{name} kept MB"]) / grown
        value = ratio(times, "joint attention", "HistoGraph")
        rows.append(row | {"ratio": value})
    finish("histograph_layers", "attention among all node-layer pairs", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
