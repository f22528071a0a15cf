"""PoolFormer: the block matters more than what mixes the tokens in it."""

from __future__ import annotations

from statistics import fmean

from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.poolformer_cost import cost_findings
from cenote.reproductions.poolformer_digits import VARIANTS, digit_accuracy
from cenote.reproductions.poolformer_exact import exact_findings
from cenote.reproductions.poolformer_figure import draw

CLAIM = (
    "A transformer block whose attention is replaced by average pooling without parameters learns well: mixing by "
    "pooling beats no mixing, and the block's residuals and MLPs are what it cannot do without."
)
CHANCE = 20.0
"""Per cent of ten classes up to which a network is called near chance."""

Scores = dict[str, list[float]]


def run(settings: Settings) -> list[Finding]:
    scores: Scores = {name: [] for name in VARIANTS}
    for name in VARIANTS:
        for seed in settings.seeds:
            settings.progress(f"digits: {name}, seed {seed}")
            scores[name].append(digit_accuracy(name, seed, steps=500 if settings.quick else 2000))
    settings.progress("cost against pixels and against attention")
    cost = cost_findings((16, 32, 64) if settings.quick else (16, 32, 64, 128))
    settings.progress("exact properties")
    return [*digit_findings(scores, settings.quick), *cost, *exact_findings()]


def digit_findings(scores: Scores, quick: bool) -> list[Finding]:
    """What the variants' accuracies say."""

    def lead(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(scores[one], scores[other], strict=True)]

    means = "; ".join(f"{name} {fmean(values):.1f}" for name, values in scores.items())
    points = "points of accuracy"
    return [
        finding(
            "On scikit-learn's digits pooling is ahead of a network of the same blocks that mixes nothing.",
            "at least 5 points",
            lead("pooling", "identity"),
            lambda v: v >= 5,
            paper="77.2 against 74.3 % on ImageNet-1K (S12)",
            unit=points,
            note=f"Stem of 2 x 2 patches, four blocks of width 32, {500 if quick else 2000} steps at a rate of 0.01 "
            "for all (with validation items of one seed pooling also led at 0.003 and 0.03). "
            f"Mean accuracy in per cent: {means}.",
        ),
        finding(
            "Without residual connections the network learns next to nothing.",
            f"at most {CHANCE:g} %",
            scores["no residual"],
            lambda v: v <= CHANCE,
            paper="0.1 % on ImageNet-1K",
            unit="% accuracy",
        ),
        finding(
            "Without channel MLPs the network learns next to nothing.",
            f"at most {CHANCE:g} %",
            scores["no MLP"],
            lambda v: v <= CHANCE,
            paper="2.5 % on ImageNet-1K",
            unit="% accuracy",
            note="What is left is linear but for the norms, and on digits that is enough to be well above chance.",
        ),
        finding(
            "It is the residual that is missed, not LayerScale's small start: without both it learns as little.",
            f"at most {CHANCE:g} %",
            scores["no residual, no LayerScale"],
            lambda v: v <= CHANCE,
            unit="% accuracy",
            note="Not the paper's claim. With residuals gone, factors of 1e-5 leave the norms nothing to scale; this "
            "tells that effect from the other.",
        ),
        finding(
            "Mixing by a frozen random matrix is ahead of no mixing.",
            "above 0 points",
            lead("random matrix", "identity"),
            lambda v: v > 0,
            paper="75.8 against 74.3 % on ImageNet-1K",
            unit=points,
        ),
        finding(
            "Pooling is ahead of a frozen random matrix.",
            "above 0 points",
            lead("pooling", "random matrix"),
            lambda v: v > 0,
            paper="77.2 against 75.8 % on ImageNet-1K",
            unit=points,
        ),
        finding(
            "Pooling is ahead of attention without positions, in the same blocks and as many steps.",
            "not claimed by the paper for so small a network",
            lead("pooling", "attention"),
            lambda v: v > 0,
            unit=points,
            note="Reported because a reader will ask. Attention does not know where a patch lies.",
        ),
    ]


REPRODUCTION = Reproduction("poolformer", CLAIM, run, draw)
