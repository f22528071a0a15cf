"""HaloNet: local attention in blocks with halos in the place of 3 x 3 convolutions."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from cenote.mixing.halo_attention import HaloAttention
from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.digit_encoders import digits, embedded
from cenote.reproductions.fitting import Labelled
from cenote.reproductions.halonet_exact import exact_findings
from cenote.reproductions.halonet_worlds import (
    conv_classifier,
    count,
    dots_network,
    fit,
    halo_classifier,
    per_cent_right,
    two_dots,
)
from cenote.reproductions.rows_figure import draw_rows
from cenote.reproductions.small_cnn import fashion

CLAIM = (
    "Attention in blocks that share a halo takes the place of 3 x 3 convolutions at equal parameters, sees across the "
    "borders of blocks, and costs time in proportion to the pixels."
)
RATES = (3e-3, 1e-2)
LEARNT = 80.0
"""Per cent right within one block from which on a network without a halo counts as trained."""
UNSEEN = 10_000
"""Added to the seeds of weights and images of two dots: the setting was chosen on smaller ones."""
HISTORY = (
    "How the setting came about: width and depth are one of five tried on one seed and kept for the test accuracy of "
    "h = 2, which favours h = 2; in another (two blocks of width 16, rate 0.003, 300 steps) it was behind, 80 to 85 %. "
    "At 1200 steps and rate 0.01 for both, h = 0 predicted a constant on two seeds of two, hence the choice of rates. "
    "Nothing was chosen since, and these weights and images are none of those."
)
FASHION = "fashion_mnist/fashion_mnist_12k_4k.npz"


def run(settings: Settings) -> list[Finding]:
    images = digits(embedded().config)
    steps, batch = (200, 32) if settings.quick else (1000, 64)
    found = [_against_convolution(settings, "digits", images.train, images.test, (4, 2, 1), steps, batch)]
    if not settings.quick and settings.data_dir is not None and (settings.data_dir / FASHION).is_file():
        train, test = fashion(str(settings.data_dir / FASHION), train=6000, test=2000)
        found.append(_against_convolution(settings, "Fashion-MNIST", train, test, (7, 2, 2), 1200))
    found += _across_borders(settings)
    settings.progress("time against pixels")
    found += scaling()
    settings.progress("exact properties")
    return [*found, *exact_findings()]


def _against_convolution(
    settings: Settings,
    data: str,
    train: Labelled,
    test: Labelled,
    shape: tuple[int, int, int],
    steps: int,
    batch: int = 64,
) -> Finding:
    """Networks of four blocks, attention or convolution, at equal parameters; ``shape`` is block, halo, stem stride."""
    block, halo, stem_stride = shape
    scores: dict[str, list[float]] = {"halo blocks": [], "3 x 3 convolutions": []}
    parameters: dict[str, int] = {}
    for seed in settings.seeds:
        settings.progress(f"{data}: halo blocks and convolutions, seed {seed}")
        for name, values in scores.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = halo_classifier(block, halo, stem_stride)
                if name == "3 x 3 convolutions":
                    model = conv_classifier(count(model), stem_stride)
                parameters[name] = count(model)
                values.append(per_cent_right(fit(model, train, steps, batch), test))
    written = "; ".join(f"{name}: {fmean(scores[name]):.1f} %, {parameters[name]} parameters" for name in scores)
    return finding(
        f"{data}: a small residual network with halo blocks is within 2 points of one with 3 x 3 convolutions at equal "
        "parameters.",
        "at least -2 points",
        [own - other for own, other in zip(*scores.values(), strict=True)],
        lambda v: v >= -2,
        paper="HaloNet H7 84.9 %, EfficientNet-B7 84.3 % (ImageNet, about 67M parameters both)",
        unit=f"points on {data}",
        note=f"{written}. {steps} steps of {batch} images; blocks of {block}, halo {halo}; both with one 3 x 3 "
        "convolution in front.",
    )


def _across_borders(settings: Settings) -> list[Finding]:
    """Two dots, in one block or in neighbouring ones: is their distance 1?"""
    steps = 400 if settings.quick else 1200
    test, across = two_dots(4000, UNSEEN + 1_000_000)
    parts = {
        "all pairs": test,
        "pairs across a border": Labelled(test.tokens[across], test.targets[across]),
        "pairs in one block": Labelled(test.tokens[~across], test.targets[~across]),
    }
    scores: dict[int, dict[str, list[float]]] = {halo: {name: [] for name in parts} for halo in (2, 0)}
    parameters: dict[int, int] = {}
    rates: dict[int, float] = {}
    validation, _ = two_dots(2000, UNSEEN + 2_000_000)
    for seed in settings.seeds:
        settings.progress(f"two dots with and without a halo, seed {seed}")
        train, _ = two_dots(32 * steps, UNSEEN + seed)
        for halo, values in scores.items():
            models = {}
            for rate in [rates[halo]] if halo in rates else RATES:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(UNSEEN + seed)
                    models[rate] = fit(dots_network(halo), train, steps, batch=32, lr=rate)
            if halo not in rates:
                # A rate that suits one network can make the other predict a constant: each has its own, chosen alike.
                rates[halo] = max(RATES, key=lambda r: per_cent_right(models[r], validation))
            model = models[rates[halo]]
            parameters[halo] = count(model)
            for name, part in parts.items():
                values[name].append(per_cent_right(model, part))
    written = "; ".join(
        f"h = {halo} ({parameters[halo]} parameters, rate {rates[halo]:g}): "
        + ", ".join(f"{name} {', '.join(f'{v:.1f}' for v in values)} %" for name, values in by_part.items())
        for halo, by_part in scores.items()
    )
    note = (
        f"{written}. One attention block behind a 1 x 1 convolution, 12 x 12 pixels, blocks of 4; {steps} steps of 32 "
        f"new images; of the rates {RATES} the better one on 2000 validation images of the first seed, then kept; 4000 "
        f"test images. {HISTORY}"
    )
    return dots_findings(scores[2], scores[0], note)


def dots_findings(two: dict[str, list[float]], none: dict[str, list[float]], note: str) -> list[Finding]:
    """Accuracies with a halo of two and with none, seed by seed, on all test images and on two parts of them.

    A seed on which the network without a halo failed to train shows nothing of halos, so it counts against the claim.
    """
    unit, control = "points on two dots", f"at least 1 point, and h = 0 at least {LEARNT:g} % right within one block"

    def gain(name: str) -> list[float]:
        return [a - b for a, b in zip(two[name], none[name], strict=True)]

    trained = [value >= LEARNT for value in none["pairs in one block"]]

    def ahead(claim: str, name: str, **texts: str) -> Finding:
        made = finding(claim, control, gain(name), lambda v: v >= 1, unit=unit, **texts)
        return replace(made, passed=tuple(a and b for a, b in zip(made.passed, trained, strict=True)))

    return [
        ahead(
            "Two dots in one block or in neighbouring ones, distance 1 or more: a halo of 2 beats none.", "all pairs",
            paper="a halo of 3 gains accuracy over none, then it saturates (ImageNet)", note=note,
        ),
        ahead("The gain is made on pairs across a border.", "pairs across a border"),
        finding(
            "Within one block a halo costs nothing.", "at least -2 points", gain("pairs in one block"),
            lambda v: v >= -2, unit=unit,
            note="Not claimed by the paper: a control. The window with a halo has four times the cells to learn over.",
        ),
        finding(
            "The network without a halo has learnt the task within one block, so that what it is compared with is no "
            "failed training.",
            f"at least {LEARNT:g} %", none["pairs in one block"], lambda v: v >= LEARNT,
            unit="% right within one block, h = 0", note="A seed that fails here counts against the gains above.",
        ),
    ]  # fmt: skip


@torch.no_grad()
def scaling(sides: tuple[int, int, int] = (32, 64, 96), rounds: int = 7) -> list[Finding]:
    """Forward passes on one thread: 64 channels, 4 heads, blocks of 8, halo 3."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer = HaloAttention(64, num_heads=4, block_size=8, halo_size=3).eval()
        images = {side: torch.randn(1, 64, side, side, generator=torch.Generator().manual_seed(0)) for side in sides}
        times: dict[int, list[float]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side, x in images.items():
                seconds = _seconds(layer, x)
                if number:
                    times[side].append(seconds)
        middle = sides[1]
        dense = HaloAttention(64, num_heads=4, block_size=middle, halo_size=0).eval()
        full = min(_seconds(dense, images[middle]) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    best = {side: min(values) for side, values in times.items()}
    slope = math.log(best[sides[2]] / best[sides[0]]) / (2 * math.log(sides[2] / sides[0]))
    written = ", ".join(f"{1e3 * seconds:.1f} ms at {side}" for side, seconds in best.items())
    return [
        finding(
            f"Time grows with the pixels: its exponent from {sides[0]} to {sides[2]} pixels a side.",
            "0.85 to 1.2",
            slope,
            lambda v: 0.85 <= v <= 1.2,
            unit="exponent",
            note=f"One thread: {written}.",
        ),
        finding(
            f"At {middle} pixels a side it is at least 10 times as fast as dense attention.",
            "at least 10 x",
            full / best[middle],
            lambda v: v >= 10,
            unit="x",
            note=f"Dense: the same layer with one block as large as the map, {1e3 * full:.0f} ms. Forward, one thread.",
        ),
    ]


def _seconds(layer: HaloAttention, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x)
    return time.perf_counter() - start


REPRODUCTION = Reproduction("halonet", CLAIM, run, draw_rows, needs=(FASHION,))
