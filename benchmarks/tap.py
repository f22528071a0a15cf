"""TAP's share of a block, and what the diversification loss costs with stored maps and without.

The ratio is the time of an RVT block over that of its token-aware pooling, at width 192 on 14 x 14 tokens in eval mode:
3.33 is the 30 % that TAP may take. Beside it: the official way of taking the averages (unfolded into nine copies), and
one training step of the loss on queries and keys, with maps stored and streamed, in time and in what autograd keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import finish, interleaved, ratio
from torch import Tensor
from torch.nn import functional as F

from cenote.mixing.rvt import RVTBlock
from cenote.mixing.tap import TokenAwarePooling
from cenote.ops.attention_diversity import QueryKey, attention_diversification_loss
from cenote.types import Grid

WIDTH, HEADS, GOAL = 192, 6, 1 / 0.3


def unfolded(tap: TokenAwarePooling, tokens: Tensor, grid: Grid) -> Tensor:
    """The same pooling with nine copies of the map a dilation."""
    x = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    shares = tap.scale_probs(x)
    maps = [x] + [
        F.unfold(x, 3, dilation=d, padding=d).unflatten(1, (x.shape[1], 9)).mean(dim=2).unflatten(2, tuple(grid))
        for d in range(1, tap.num_scales)
    ]
    return (torch.stack(maps, dim=-1) * shares.unsqueeze(1)).sum(dim=-1)


def loss_step(layers: list[tuple[Tensor, Tensor]], streamed: bool) -> Callable[[], Any]:
    def call() -> None:
        loss(layers, streamed).backward()

    return call


def loss(layers: list[tuple[Tensor, Tensor]], streamed: bool) -> Tensor:
    if streamed:
        return attention_diversification_loss([QueryKey(query, key) for query, key in layers])
    maps = [(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(dim=-1) for query, key in layers]
    return attention_diversification_loss(maps, check_rows=False)


def kept_megabytes(layers: list[tuple[Tensor, Tensor]], streamed: bool) -> float:
    """What autograd keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(layers, streamed)
    del value
    return sum(kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=14)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    grid = Grid(options.side, options.side)
    block = RVTBlock(WIDTH, HEADS).eval().to(device)
    tap, x = block.dilation_predictor, torch.randn(options.batch, grid.height * grid.width, WIDTH, device=device)
    machine = {"device": device, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        times = interleaved(
            {"block": lambda: block(x, grid), "TAP": lambda: tap(x, grid), "unfolded": lambda: unfolded(tap, x, grid)},
            options.repeats,
        )
    value = ratio(times, "block", "TAP")
    rows: list[dict[str, Any]] = [
        {
            **machine,
            "what": name,
            "ms": min(times[name]) * 1e3,
            "share of block %": 100 / ratio(times, "block", name),
        }
        for name in times
    ]
    shape = (options.batch, HEADS, x.shape[1], WIDTH // HEADS)
    layers = [
        tuple(torch.randn(shape, device=device, requires_grad=True) for _ in range(2)) for _ in range(options.layers)
    ]
    steps = {"ADL, maps stored": loss_step(layers, False), "ADL, streamed": loss_step(layers, True)}
    times = interleaved(steps, max(options.repeats // 3, 1), warmup=1)
    rows += [
        {
            **machine,
            "what": name,
            "ms": min(times[name]) * 1e3,
            "kept MB": kept_megabytes(layers, name == "ADL, streamed"),
        }
        for name in times
    ]
    finish("tap", "the time of its pooling in an RVT block", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
