"""What holds exactly for L-TDNN and its loss, and what it costs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cenote.ops.layer_frames import gated_layer_max
from cenote.pooling.l_tdnn import LTDNN
from cenote.reproductions.base import Finding, finding
from cenote.reproductions.golden import golden_findings
from cenote.tuning.margin import AAMSoftmax, speaker_vectors

Net = Literal["ecapa", "d3net"]
NETS: tuple[Net, ...] = ("ecapa", "d3net")
PUBLISHED: dict[tuple[Net, int, int], tuple[float, float]] = {
    ("ecapa", 768, 13): (5.72, 8.9),
    ("ecapa", 1024, 25): (6.70, 20.6),
    ("d3net", 768, 13): (6.48, 10.4),
    ("d3net", 1024, 25): (6.81, 21.0),
}
"""Parameters in millions and billions of multiply-adds for three seconds (149 frames), by network, width and layers."""


def exact_findings() -> list[Finding]:
    """Reference files, masking, special cases of the pools, the loss, parameters and operations."""
    return [*golden_findings("l-tdnn"), *_masking(), *_pools(), *_loss(), *_cost()]


def small_pool(net: Net, **options: Any) -> LTDNN:
    """A small L-TDNN whose norms have statistics and whose parameters have no special value, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pool = LTDNN(12, 4, net=net, conv_dim=16, hidden_size=24, num_heads=4, pool_dim=10, **options)
        with torch.no_grad():
            for parameter in pool.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for _ in range(3):
                pool.train()(torch.randn(8, 4, 20, 12))
    return pool.eval()


@torch.no_grad()
def _masking() -> list[Finding]:
    generator = torch.Generator().manual_seed(0)
    lengths = (20, 9, 3, 1)
    clips = [torch.randn(1, 4, n, 12, generator=generator) for n in lengths]
    alone_padded, full_biased, full_official = 0.0, 0.0, []
    for net in NETS:
        pool, official = small_pool(net), small_pool(net, masked="statistics", deviation="official")
        official.load_state_dict(pool.state_dict())
        for left, right in ((0, 0), (0, 7), (3, 0), (50, 50)):
            rows, masks = zip(*(_padded(clip, left, 20 - clip.shape[2] + right) for clip in clips), strict=True)
            together = pool(torch.cat(rows), torch.cat(masks))
            alone_padded = max(alone_padded, _distance(together, torch.cat([pool(clip) for clip in clips])))
        x = torch.randn(3, 4, 20, 12, generator=generator)
        full = torch.ones(3, 20, dtype=torch.bool)
        full_biased = max(full_biased, _distance(pool(x, full), pool(x)), _distance(pool(x), official(x, full)))
        full_official.append(_distance(official(x, full), official(x)))
    return [
        _at_most("A clip alone equals the clip padded in a batch, by up to 119 frames in all.", alone_padded, 1e-4),
        _at_most("With full lengths the masked path is the unmasked and the published masked one.", full_biased, 1e-5),
        finding(
            "As published, a mask without padding changes the vector, since the deviation is divided by N with it and "
            "by N - 1 without.",
            "at least 1e-5 (rounding is near 1e-6)",
            min(full_official),
            lambda v: v >= 1e-5,
            unit="largest difference",
        ),
    ]  # fmt: skip


@torch.no_grad()
def _pools() -> list[Finding]:
    generator = torch.Generator().manual_seed(1)
    pool = small_pool("ecapa")
    y = torch.randn(5, 15, 24, generator=generator)
    mask = torch.arange(15) < torch.tensor([15, 12, 8, 3, 2])[:, None]
    nn.init.zeros_(pool.attention_out.weight)
    nn.init.zeros_(pool.attention_out.bias)
    mean = torch.stack([row[real].mean(dim=0) for row, real in zip(y, mask, strict=True)])
    deviation = torch.stack([row[real].std(dim=0, correction=0) for row, real in zip(y, mask, strict=True)])
    statistics = pool.statistics_norm(torch.cat([mean, deviation], dim=-1)[:, None], None)
    plain = pool.out_norm(pool.out_projection(statistics), None)[:, 0]
    uniform = _distance(pool.pool_frames(y, mask)[0], plain)

    net = pool.convolve(torch.randn(5, 4, 15, 12, generator=generator))
    layers = pool.layer_pool
    projected = layers.project(net, None)
    gates = layers.gate(projected)
    outside = float(torch.maximum(-gates, gates - 1).max())
    nn.init.zeros_(layers.w2)
    worst = 0.0
    for s in (0.1, 0.5, 0.9):
        nn.init.constant_(layers.b2, math.log(s / (1 - s)) / 2)
        equal = gated_layer_max(projected, layers.gate(projected))
        worst = max(worst, _distance(equal, s * projected.amax(dim=1)))
    vectors = speaker_vectors(y[:, 0], 3)
    return [
        _at_most("With zero attention weights the statistics are mean and biased deviation.", uniform, 1e-5),
        finding("Layer gates lie between 0 and 1.", "below 0", outside, lambda v: v < 0, unit="outside by"),
        _at_most("With all gates equal to s the layer pool is s times the maximum over layers.", worst, 1e-6),
        _at_most("Speaker vectors have unit length.", float((vectors.norm(dim=-1) - 1).abs().max()), 1e-6),
    ]  # fmt: skip


@torch.no_grad()
def _loss() -> list[Finding]:
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(64, 12, generator=generator), torch.randint(9, (64,), generator=generator)
    losses, plain = [], 0.0
    for margin in (0.0, 0.1, 0.2, 0.3, 0.5, 1.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = AAMSoftmax(12, 9, num_heads=2, margin=margin)
        out = loss(x, labels)
        losses.append(out.loss.item())
        if margin == 0:
            halves = x.view(64, 2, 6)
            cosines = F.cosine_similarity(halves[..., None], loss.weight[None], dim=2)
            each = [F.cross_entropy(30 * cosines[:, head], labels) for head in range(2)]
            plain = abs(float(sum(each) / 2 - out.loss))
    return [
        _at_most("At margin 0 the loss is the cross-entropy of scaled cosines, mean over heads.", plain, 1e-5),
        finding(
            "The loss grows with the margin (0 to 1 rad).",
            "above 0",
            min(b - a for a, b in pairwise(losses)),
            lambda v: v > 0,
            unit="smallest step of the loss",
        ),
    ]


def _cost() -> list[Finding]:
    counted = {key: (_parameters(*key), _operations(*key, 149)) for key in PUBLISHED}
    parameters = max(abs(counted[key][0] / 1e6 - PUBLISHED[key][0]) for key in PUBLISHED)
    operations = max(abs(counted[key][1] / 1e9 / PUBLISHED[key][1] - 1) for key in PUBLISHED)
    doubling, growth = 0.0, 0.0
    for net in NETS:
        base = _operations(net, 768, 13, 100)
        doubled = (_operations(net, 768, 26, 100), _operations(net, 768, 13, 200))
        doubling = max(doubling, *(abs(each / base - 2) for each in doubled))
        growth = max(growth, _parameters(net, 768, 49) / _parameters(net, 768, 13) - 1)
    text = ", ".join(f"{net} {dim} x {layers}: {p / 1e6:.2f} M, {o / 1e9:.2f} G"
                     for (net, dim, layers), (p, o) in counted.items())  # fmt: skip
    return [
        _at_most("Parameters at the published sizes are those of the specification.", parameters, 0.0051, "million"),
        finding(
            "Operations for three seconds are those of the specification.",
            "within 2 %",
            100 * operations,
            lambda v: v <= 2,
            unit="% of difference",
            note=f"Counted: {text}. A little less, because what mean and deviation add to the attention is one product "
            "a clip here.",
        ),
        finding(
            "Operations are linear in layers x frames: twice the layers, or twice the frames, cost twice as much.",
            "ratio within 0.03 of 2",
            doubling,
            lambda v: v <= 0.03,
            unit="from 2",
        ),
        finding(
            "Parameters are nearly independent of the number of layers.",
            "at most 0.5 % more for 49 layers than for 13",
            100 * growth,
            lambda v: v <= 0.5,
            unit="% more",
        ),
    ]


def _parameters(net: Net, dim: int, layers: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LTDNN(dim, layers, net=net).parameters())


def _operations(net: Net, dim: int, layers: int, frames: int) -> int:
    """Multiply-adds for one clip."""
    with torch.device("meta"):
        pool = LTDNN(dim, layers, net=net).eval()
        with FlopCounterMode(display=False) as counter:
            pool(torch.empty(1, layers, frames, dim))
    return counter.get_total_flops() // 2


def _padded(clip: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    mask = F.pad(torch.ones(1, clip.shape[2], dtype=torch.bool), (left, right))
    return F.pad(clip, (0, 0, left, right), value=1e4), mask


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _at_most(claim: str, value: float, bound: float, unit: str = "largest difference") -> Finding:
    return finding(claim, f"at most {bound:g}", value, lambda v: v <= bound, unit=unit)
