"""Associative recall by one layer of every rule: with and without the convolution, and by the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from cenote.mixing.regressor import RULES
from cenote.reproductions.base import Finding, Settings, finding
from cenote.worlds.models import SequenceModel
from cenote.worlds.recall import AssociativeRecall
from cenote.worlds.training import fit_sequences, sequence_accuracy

WIDTH, STEPS, RATE = 48, 500, 3e-3
SHOWN = {"local_constant": "softmax attention", "linear_attention": "linear attention", "delta_rule": "the delta rule"}
KEY_WIDTH = 16
SIZES = (4, 8, 16, 32)
CURVE = "Recall by number of pairs:"


def recall(rule: str, pairs: int, seed: int, *, convolve: bool = True, head_dim: int = WIDTH) -> float:
    """Share of the keys answered right by one block, trained 500 steps. One head, so that the key has the width given;
    the only other place where a token could see its neighbour is the convolution of length 3 on the keys. NaN where
    training diverges."""
    torch.manual_seed(seed)
    world = AssociativeRecall(pairs=pairs)
    options = {"num_heads": 1, "head_dim": head_dim, "conv_on": "k" if convolve else "", "conv_size": 3}
    model = SequenceModel(world.vocabulary, WIDTH, 1, rule, options=options)
    try:
        fit_sequences(model, world, STEPS, lr=RATE, seed=seed)
    except FloatingPointError:
        return float("nan")
    return sequence_accuracy(model, world)


def convolution_findings(settings: Settings) -> list[Finding]:
    """Eight pairs with the convolution and without."""
    found = []
    for rule, shown in SHOWN.items():
        settings.progress(f"recall of 8 pairs by {shown}")
        found.append(
            finding(
                f"One layer of {shown} with a convolution of length 3 on the keys recalls 8 pairs.",
                "above 0.97",
                [recall(rule, 8, seed) for seed in settings.seeds],
                lambda v: v > 0.97,
                paper="one layer with a short convolution solves it (inferred); specification's trial 1.0",
                unit="share of the answers",
            )
        )
    for rule, shown in SHOWN.items():
        settings.progress(f"the same without convolution by {shown}")
        seeds = settings.seeds[:1] if settings.quick else settings.seeds
        found.append(
            finding(
                f"One layer of {shown} without the convolution does not.",
                "below 0.2",
                [recall(rule, 8, seed, convolve=False) for seed in seeds],
                lambda v: v < 0.2,
                paper="specification's trial 0.12 to 0.13",
                unit="share of the answers",
                note="1/8 is what guessing one of the values shown gives.",
            )
        )
    return found


def curve_findings(settings: Settings) -> list[Finding]:
    """Recall against the number of pairs, key width 16, for each rule; quick for three of them and two sizes."""
    rules: Sequence[str] = tuple(SHOWN) if settings.quick else tuple(RULES)
    sizes = SIZES[::2] if settings.quick else SIZES
    curves = {}
    for rule in rules:
        settings.progress(f"recall by number of pairs: {rule}")
        curves[rule] = [recall(rule, n, settings.seeds[0], head_dim=KEY_WIDTH) for n in sizes]
    most, least = sizes[-1], curves["linear_attention"][-1] - 0.02

    def curve(rule: str) -> str:
        return f"{CURVE} " + ", ".join(f"{n} {share:.3f}" for n, share in zip(sizes, curves[rule], strict=True)) + "."

    found = [
        finding(
            f"With keys of width {KEY_WIDTH}, {rule} recalls as much of {most} pairs as linear attention.",
            f"at least {least:.3f} (linear attention's share less 0.02)",
            share[-1],
            lambda v: v >= least,
            paper="no number",
            unit=f"share of the answers, {most} pairs",
            note=f"{curve(rule)} 500 steps whatever the rule: what is slow to learn shows as low; nan where training "
            "diverged.",
        )
        for rule, share in curves.items()
        if rule != "linear_attention"
    ]
    pressed = curves["linear_attention"]
    return [
        finding(
            f"With keys of width {KEY_WIDTH}, linear attention recalls fewer of {most} pairs than of {sizes[0]}.",
            "below 1 (ratio of the shares)",
            pressed[-1] / pressed[0],
            lambda v: v < 1,
            unit="ratio of the shares",
            note=f"{curve('linear_attention')} Mean {fmean(pressed):.2f}.",
        ),
        *found,
    ]
