"""Reductions over frames of a ragged batch, all items at once with a mask, against one item after the other.

Forward and backward at batch 32. The loops are those of s3prl-style pooling: index an item of the batch, cut it to its
length, reduce, stack the results. Indexing costs a gradient of the whole batch's size for every item; a second loop
takes the items from one ``unbind``, which does not. ``--quick`` takes tiny sizes, ``--threads N`` as many threads.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import finish, interleaved, ratio
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cenote.allocator import keep_freed_memory
from cenote.ops.statistics import masked_statistics
from cenote.pooling.attentive_statistics import AttentiveStatistics
from cenote.pooling.l_tdnn import LTDNN
from cenote.pooling.layers import WeightedLayers

QUICK = "--quick" in sys.argv
BATCH, DIM, LAYERS = (4, 16, 3) if QUICK else (32, 768, 13)
FRAMES = (10,) if QUICK else (50, 150, 750)
LAYER_FRAMES = (10,) if QUICK else (50,)
REPEATS = 2 if QUICK else 7
GOAL = 10

Items = Tensor | Sequence[Tensor]
"""A batch that is indexed item by item, or its items unbound beforehand."""


def mean_and_deviation(x: Tensor, mask: Tensor) -> Tensor:
    return torch.cat(masked_statistics(x, mask), dim=-1)


def mean_and_deviation_loop(x: Items, lengths: list[int]) -> Tensor:
    rows = []
    for number, length in enumerate(lengths):
        item = x[number][:length]
        rows.append(torch.cat([item.mean(dim=0), item.std(dim=0, correction=0)]))
    return torch.stack(rows)


def attentive_loop(pool: AttentiveStatistics, x: Items, lengths: list[int]) -> Tensor:
    rows = []
    for number, length in enumerate(lengths):
        item = x[number][:length]
        weights = pool.score(pool.hidden(item).tanh()).softmax(dim=0)
        mean = (weights * item).sum(dim=0)
        variance = (weights * (item - mean).square()).sum(dim=0)
        rows.append(torch.cat([mean, variance.clamp(min=pool.variance_floor).sqrt()]))
    return torch.stack(rows)


def ltdnn_loop(pool: LTDNN, x: Items, lengths: list[int]) -> Tensor:
    return torch.cat([pool.pool_frames(x[number][None, :length])[0] for number, length in enumerate(lengths)])


def layers_loop(reduction: WeightedLayers, x: Items, lengths: list[int]) -> Tensor:
    weights = reduction.weight.softmax(dim=0)
    rows = []
    for number, length in enumerate(lengths):
        item = x[number][:, :length]
        total = weights[0] * item[0]
        for layer in range(1, len(weights)):
            total = total + weights[layer] * item[layer]
        rows.append(total)
    return pad_sequence(rows, batch_first=True)


def layers_at_once(reduction: WeightedLayers, x: Tensor, mask: Tensor) -> Tensor:
    return reduction(x) * mask.unsqueeze(-1)


def row(
    method: str,
    shape: tuple[int, ...],
    ours: Callable[[Tensor, Tensor], Tensor],
    loop: Callable[[Items, list[int]], Tensor],
    module: torch.nn.Module | None = None,
) -> dict[str, Any]:
    """One line of the table, after a check that both compute the same; half the frames are padding in the shortest."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frames = shape[-2]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(frames // 2, frames + 1, (shape[0],), generator=generator)
    lengths[0] = frames
    mask = (torch.arange(frames) < lengths[:, None]).to(device)
    x = torch.randn(shape, generator=generator).to(device).requires_grad_()
    inputs = [x, *(p for p in module.to(device).parameters())] if module is not None else [x]
    expected = loop(x, lengths.tolist())
    torch.testing.assert_close(ours(x, mask), expected, rtol=1e-3, atol=1e-4)
    upstream = torch.randn(expected.shape, generator=generator).to(device)

    def both_ways(result: Tensor) -> None:
        torch.autograd.grad((result * upstream).sum(), inputs, allow_unused=True)

    calls = {
        "at once": lambda: both_ways(ours(x, mask)),
        "loop": lambda: both_ways(loop(x, lengths.tolist())),
        "unbound loop": lambda: both_ways(loop(x.unbind(), lengths.tolist())),
    }
    times = interleaved(calls, repeats=REPEATS, warmup=1)
    return {
        "method": method,
        "shape": " x ".join(map(str, shape)),
        "device": device,
        "threads": torch.get_num_threads(),
        **{f"{name} ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        "ratio": ratio(times, "loop", "at once"),
        "ratio to unbound": ratio(times, "unbound loop", "at once"),
    }


def main() -> None:
    if "--threads" in sys.argv:
        torch.set_num_threads(int(sys.argv[sys.argv.index("--threads") + 1]))
    keep_freed_memory()
    torch.manual_seed(0)
    attentive = AttentiveStatistics(DIM)
    ltdnn = LTDNN(DIM, 2, conv_dim=8, hidden_size=2 * DIM // 3 // 8 * 8).eval()
    width = ltdnn.attention_out.out_features
    weighted = WeightedLayers(DIM, LAYERS)
    named, further = [], []
    for frames in FRAMES:
        shape = (BATCH, frames, DIM)
        named.append(row("mean and deviation", shape, mean_and_deviation, mean_and_deviation_loop))
        further.append(row("attentive statistics", shape, attentive, partial(attentive_loop, attentive),
                           attentive))  # fmt: skip
        further.append(row("L-TDNN statistics pool", (BATCH, frames, width), lambda x, m: ltdnn.pool_frames(x, m)[0],
                           partial(ltdnn_loop, ltdnn), ltdnn))  # fmt: skip
    at_once, loop = partial(layers_at_once, weighted), partial(layers_loop, weighted)
    for frames in LAYER_FRAMES:
        shape = (BATCH, LAYERS, frames, DIM)
        named.append(row("weighted layers", shape, at_once, loop, weighted))
    # The pools with matrix products do the same products either way, so the goal is judged by the reductions alone.
    worst = min(each["ratio"] for each in named)
    finish("masked_statistics", "per-item loops (slowest row)", GOAL, [*named, *further], worst, __doc__)


if __name__ == "__main__":
    main()
