"""GGeM: groups of channels that want different exponents, and what signed tokens do to a power mean."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cenote.backbones.masked_autoencoder import PretrainSettings
from cenote.backbones.tiny_vit import TinyViT
from cenote.ops.power import power_mean
from cenote.pooling import create_pooling
from cenote.pooling.base import Pooling
from cenote.pooling.gem import GeM
from cenote.pooling.ggem import GGeM
from cenote.pooling.power_mean import PowerMeanPooling
from cenote.reproductions.base import Finding, Reproduction, Settings, at_most, finding
from cenote.reproductions.digit_encoders import PATCHES, digits, embedded, encode, masked_autoencoder
from cenote.reproductions.fitting import Parts, converged_accuracy, trained_accuracy
from cenote.reproductions.golden import golden_findings
from cenote.reproductions.planted import planted_parts, two_kinds_of_evidence
from cenote.reproductions.rows_figure import draw_rows

CLAIM = "One exponent for each group of channels pools better than one exponent for all, the mean or the maximum."
SPECIFIED = {"mean": 73.0, "max": 61.0, "GeM": 75.0, "GGeM": 99.0}
"""Accuracies that the specification gives for the planted data."""


def run(settings: Settings) -> list[Finding]:
    settings.progress("planted data")
    planted = _planted(settings.seeds)
    if not settings.quick:
        settings.progress("planted data with half the noise")
        planted += _half_the_noise(settings.seeds)
    encoders = [embedded()]
    if not settings.quick:
        encoders = [_pretrained(seed, settings) for seed in settings.seeds]
    settings.progress("signed tokens of masked autoencoders")
    signed = _signed_tokens(encoders)
    settings.progress("exact properties")
    return [*planted, *signed, *exact_findings()]


def _pretrained(seed: int, settings: Settings) -> TinyViT:
    settings.progress(f"pretrain a masked autoencoder, seed {seed}")
    config = embedded().config
    return masked_autoencoder(digits(config), config, PretrainSettings(seed=seed))


def exact_findings() -> list[Finding]:
    """Everything that holds whatever the data, and needs no training."""
    x = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    return [*golden_findings("ggem"), *_one_exponent(x), *_groups(x)]


def _planted(seeds: Sequence[int]) -> list[Finding]:
    accuracies, exponents = _fits(seeds, noise=1.0)
    lead = [
        own - max(rest)
        for own, *rest in zip(*(accuracies[name] for name in ("GGeM", "GeM", "mean", "max")), strict=True)
    ]
    found = [
        finding(
            "On planted data GGeM is ahead of the best of GeM, mean and maximum.",
            "at least 15 points",
            lead,
            lambda v: v >= 15,
            paper="24 points (specification); the paper claims 0.1 to 0.7 points on ImageNet-1k",
            unit="points",
            note=(
                "The evidence sits in a fixed channel, as the specification's text is most simply read. It leaves open "
                "whether the channel is fixed; a channel drawn anew for every item lowers all four accuracies further."
            ),
        )
    ]
    for name, specified in SPECIFIED.items():
        found.append(
            finding(
                f"Accuracy of {name} on the planted data.",
                f"within 5 points of {specified:g}",
                accuracies[name],
                _within(specified, 5),
                unit="% of planted items",
                note=_NOISE_NOTE if name == "mean" else "",
            )
        )
    high, low = zip(*exponents["GGeM"], strict=True)
    return [
        *found,
        finding(
            "GGeM learns an exponent near the maximum for the group with one telling token.",
            "about 12 (8 to 18)",
            high,
            lambda p: 8 <= p <= 18,
            unit="p",
        ),
        finding(
            "GGeM learns an exponent at the clamp, a geometric mean, for the group that every token tells about.",
            "below 0.1",
            low,
            lambda p: p < 0.1,
            unit="p of the second group",
            note="The exponent as used; it starts at 3 and the clamp is 0.01.",
        ),
    ]


_NOISE_NOTE = (
    "The specification's accuracies do not follow from its text: the mean of 16 uniform(0, 1) values moved by 1.5/16 "
    "tells the first bit with 74 % at best, the mean of 16 exponential(1) values moved by 0.45 the second with 82 %, "
    "together 61 %, not 73. Exponential noise of mean 1/2 gives numbers close to all four, as the full run shows."
)


def _half_the_noise(seeds: Sequence[int]) -> list[Finding]:
    accuracies, _ = _fits(seeds, noise=0.5)
    means = {name: sum(values) / len(values) for name, values in accuracies.items()}
    gap = max(abs(means[name] - SPECIFIED[name]) for name in SPECIFIED)
    return [
        finding(
            "With exponential noise of mean 1/2 the four accuracies of the specification come out.",
            "largest deviation of a mean over seeds at most 5 points",
            gap,
            lambda v: v <= 5,
            unit="points",
            note="Measured: " + ", ".join(f"{name} {value:.1f}" for name, value in means.items()) + ".",
        )
    ]


def _fits(seeds: Sequence[int], noise: float) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """Test accuracies by pooling, one a seed, and the exponents that GeM and GGeM ended with."""
    accuracies: dict[str, list[float]] = {name: [] for name in SPECIFIED}
    exponents: dict[str, list[list[float]]] = {"GeM": [], "GGeM": []}
    for seed in seeds:
        parts = planted_parts(partial(two_kinds_of_evidence, noise=noise), seed)
        for name in ("mean", "max"):
            accuracies[name].append(converged_accuracy(parts, create_pooling(name, dim=16)))
        for name, spec in (("GeM", "gem"), ("GGeM", "ggem(num_groups=2)")):
            fit = trained_accuracy(parts, spec, lrs=(1e-2,), rate_factors={"p": 5.0}, seeds=(seed,), batch_size=128)
            accuracies[name] += fit.accuracies
            exponents[name].append(_exponents(fit.poolings[0]))
    return accuracies, exponents


def _exponents(pool: Pooling) -> list[float]:
    assert isinstance(pool, PowerMeanPooling)
    return pool.exponents.tolist()


def _signed_tokens(encoders: Sequence[TinyViT]) -> list[Finding]:
    """Frozen tokens of masked autoencoders read by a converged probe; one value an encoder."""
    means, differences, clamped = [], [], []
    for encoder in encoders:
        parts = encode(encoder, digits(encoder.config)).read(PATCHES)
        means.append(converged_accuracy(parts, lambda x: x.mean(dim=1)))
        gem = partial(_gem, parts, encoder.config.dim)
        scores = (gem(1.0), gem(3.0), gem(3.0, offset=True), gem(20.0, offset=True))
        differences.append([score - means[-1] for score in scores])
        clamped.append(100 * GeM(encoder.config.dim).clamped_fraction(parts.train.tokens).item())
    p1, p3, offset3, offset20 = zip(*differences, strict=True)
    note = (
        "One value an encoder: the shipped one, or in the full run one a pretraining seed, of which seed 0 gives the "
        f"shipped one. The mean has {', '.join(f'{m:.1f}' for m in means)} %. Arbitrary frozen tokens are where a "
        "power mean promises no gain."
    )
    worse: tuple[str, Callable[[float], bool]] = ("at least 3 points below the mean", lambda v: v <= -3)
    no_worse: tuple[str, Callable[[float], bool]] = ("at most 1 point below the mean", lambda v: v >= -1)
    unit = "points from the mean"
    return [
        finding("On signed tokens clamping alone (GeM with p = 1) is worse than the mean.", worse[0], p1, worse[1],
                paper="-9.5 points (specification)", unit=unit, note=note),
        finding("On signed tokens clamped GeM with p = 3 is worse than the mean.", worse[0], p3, worse[1],
                paper="-6.2 points (specification)", unit=unit),
        finding("After subtracting each channel's training minimum, GeM with p = 3 is no worse than the mean.",
                no_worse[0], offset3, no_worse[1], paper="+1.4 points (specification)", unit=unit),
        finding("After subtracting each channel's training minimum, GeM with p = 20 is no worse than the mean.",
                no_worse[0], offset20, no_worse[1], paper="+2.2 points (specification)", unit=unit),
        finding("About half of the entries of signed tokens are clamped away.", "45 to 60 %", clamped,
                lambda v: 45 <= v <= 60, paper="53 % (specification)", unit="% clamped"),
    ]  # fmt: skip


def _gem(parts: Parts, dim: int, p: float, offset: bool = False) -> float:
    pool = GeM(dim, p=p, offset=offset)
    if offset:
        pool.fit_offset(parts.train.tokens)
    return converged_accuracy(parts, pool)


def _one_exponent(x: Tensor) -> list[Finding]:
    def f(p: float, tokens: Tensor = x) -> Tensor:
        return power_mean(tokens, torch.tensor([p], dtype=tokens.dtype))

    exponents = [2.0**k for k in range(7)]
    single = max(_relative(f(p, x.float()).double(), f(p, x.float().double())) for p in exponents)
    top, low = x.amax(dim=1), x.amin(dim=1)
    ladder = [f(p) for p in (0.02, 0.1, 0.5, *exponents, 1000.0)]
    outside = max(float(torch.maximum(v - top, low - v).max()) for v in ladder)
    fall = max(float((a - b).max()) for a, b in pairwise(ladder))
    scaling = max(_relative(f(p, 2.5 * x), 2.5 * f(p)) for p in exponents)
    return [
        at_most("In float32 the log-domain form agrees with float64 for p from 1 to 64.", single, 1e-5, "relative"),
        at_most("p = 1 on positive tokens is the mean.", _relative(f(1.0), x.mean(dim=1)), 1e-12, "relative"),
        at_most(
            "p = 1000 is within ln(N)/1000 of the maximum.",
            float(((top - f(1000.0)) / top).max()),
            math.log(16) / 1000,
            "relative",
        ),
        at_most("The result lies between the smallest and the largest token.", outside, 1e-12, "outside by"),
        at_most("The result does not fall as p grows (power-mean inequality).", fall, 1e-12, "fall"),
        at_most("Scaling positive tokens scales the result.", scaling, 1e-12, "relative"),
    ]


def _groups(x: Tensor) -> list[Finding]:
    gem = GeM(24, p=2.5).double()(x)
    same = [GGeM(24, groups, p=2.5).double()(x) for groups in (1, 6, 24)]
    values = torch.tensor([1.0, 2.0, 3.0, 3.0, 4.0, 6.0])
    pool: torch.nn.Module = GGeM.from_reference({"p": values}, dim=24, num_groups=6).double()
    padded = torch.cat([torch.full((3, 2, 24), float("nan"), dtype=x.dtype), x, torch.full((3, 3, 24), 1e9)], dim=1)
    mask = torch.zeros(3, 21, dtype=torch.bool)
    mask[:, 2:18] = True
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    points = x[:2, :5].clone().requires_grad_(), values.double().requires_grad_()
    call: Callable[[Tensor, Tensor], Tensor] = lambda tokens, p: torch.func.functional_call(pool, {"p": p}, (tokens,))  # noqa: E731
    found = [
        at_most(
            "One group, and equal exponents in all groups, are GeM.",
            max(_relative(s, gem) for s in same),
            1e-12,
            "relative",
        ),
        at_most("The order of the tokens changes nothing.", _relative(pool(x[:, order]), pool(x)), 1e-12, "relative"),
        at_most(
            "A padded row with its mask pools as the row alone.",
            _relative(pool(padded, mask), pool(x)),
            1e-12,
            "relative",
        ),
        finding(
            "Gradients for tokens and exponents pass gradcheck in float64.",
            "passes",
            float(torch.autograd.gradcheck(call, points)),
            lambda v: v == 1,
            unit="(1 = passes)",
        ),
    ]
    if importlib.util.find_spec("torch_geometric") is not None:
        from torch_geometric.nn.aggr import PowerMeanAggregation

        # Its clamps also cut off the mean of the powers, by default at 100: here they are out of the way.
        peer = PowerMeanAggregation(learn=True, channels=24, clamp_min=1e-12, clamp_max=1e12).double()
        peer.p.data.copy_(values.repeat_interleave(4))
        theirs = peer(x.flatten(0, 1), torch.arange(3).repeat_interleave(16))
        ours = GGeM.from_reference({"p": values}, dim=24, num_groups=6, eps=1e-12).double()(x)
        found.append(
            at_most(
                "PyTorch Geometric's PowerMeanAggregation with repeated exponents agrees.",
                _relative(ours, theirs),
                1e-9,
                "relative",
            )
        )
    return found


def _within(value: float, points: float) -> Callable[[float], bool]:
    return lambda v: abs(v - value) <= points


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() / b.abs()).max().item()


REPRODUCTION = Reproduction("ggem", CLAIM, run, draw_rows)
