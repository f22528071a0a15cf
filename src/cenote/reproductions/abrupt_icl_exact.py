"""What holds of the classification stream, its network and its reduced model whatever the training."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.worlds.context_classification import ContextClassification
from cenote.worlds.induction import InductionNetwork
from cenote.worlds.induction_theory import descend, phenomenological_loss

TIMES = {32: (18.0, 98.5, 99.5, 106.5), 16: (32.5, 120.0, 122.0, 129.5), 9: (195.5, 227.0, 240.5, 250.0)}
"""By number of labels, for eight pairs: when the loss is first below 0.99 ln L, 1.02 ln N, ln N / 2 and 0.1."""
PAIRS = 8


def exact_findings() -> list[Finding]:
    """The reference file, the generator's invariants, attention, and the phenomenological model."""
    return [*golden_findings("abrupt-icl"), *_generator(), *_attention(), *_phenomenological()]


def _generator() -> list[Finding]:
    world = ContextClassification(burstiness=2)
    batch = world.sample(2000, 0)
    context, target = batch.classes[:, :-1], batch.classes[:, -1:]
    copies = (context[:, :, None] == context[:, None]).sum(dim=2)
    label_copies = (batch.labels[:, :, None] == batch.labels[:, None]).sum(dim=2)
    place, content = batch.inputs[..., : world.positions], batch.inputs[..., world.positions :]
    start = place[:, 0].argmax(dim=1)
    expected = torch.nn.functional.one_hot(start[:, None] + torch.arange(world.tokens), world.positions)
    norm = float(content[:, ::2].square().sum(dim=2).mean())
    fresh = replace(world, p_fresh=0.5).sample(2000, 0)
    best = float((world.best(fresh) == fresh.targets).double().mean())
    wrong = {
        "classes not shown twice": (copies != 2).sum(),
        "labels shared by two classes": (label_copies != 2).sum(),
        "targets not in the context": (~(context == target).any(dim=1)).sum(),
        "positions that are no shifted identity": (place != expected).any(dim=2).sum(),
    }
    return [
        finding(
            "Bursty sequences show N / B classes of different labels B times each, ask for one of them, and stand at "
            "consecutive positions.",
            "no exception in 2000",
            float(sum(int(count) for count in wrong.values())),
            lambda v: v == 0,
            unit="exceptions",
            note="Counted: " + ", ".join(f"{what} {int(count)}" for what, count in wrong.items()) + ".",
        ),
        finding(
            "Items have squared norm 1 on average.", "within 0.05", norm, lambda v: abs(v - 1) <= 0.05, unit="mean"
        ),
        finding(
            "The label of the nearest item answers fresh and known classes alike.",
            "at least 0.99",
            best,
            lambda v: v >= 0.99,
            unit="accuracy",
            note="The best known predictor that stands beside the stream, at the paper's sizes.",
        ),
    ]


@torch.no_grad()
def _attention() -> list[Finding]:
    world = ContextClassification()
    trace = InductionNetwork.for_world(world, generator=torch.Generator().manual_seed(0)).trace(
        world.sample(50, 0).inputs
    )
    ahead = max(float(weights.triu(1).abs().max()) for weights in trace.attention)
    rows = max(float((weights.sum(dim=-1) - 1).abs().max()) for weights in trace.attention)
    return [
        at_most("No token attends to a later one.", ahead, 0, "largest attention ahead"),
        at_most("Attention rows sum to one.", rows, 1e-5, "max abs difference"),
    ]


def _phenomenological() -> list[Finding]:
    slopes, others = [], []
    for labels in (8, 9, 16, 32):
        at = phenomenological_loss(0, 0, 0, PAIRS, labels)
        slopes.append(abs(at.dxi + (labels - PAIRS) / (labels * (2 * PAIRS + 1))))
        others += [abs(at.da), abs(at.db)] + ([abs(at.dxi)] if labels == PAIRS else [])
    away, rows = [], []
    for labels, wanted in TIMES.items():
        way = descend(PAIRS, labels)
        levels = (0.99 * math.log(labels), 1.02 * math.log(PAIRS), math.log(PAIRS) / 2, 0.1)
        found = [way.first_below(level) for level in levels]
        away += [100 * abs(time / expected - 1) for time, expected in zip(found, wanted, strict=True)]
        rows.append(f"L={labels}: {', '.join(f'{time:g}' for time in found)}")
    still = float(abs(descend(PAIRS, PAIRS).states).max())
    return [
        at_most("At the origin the loss falls by xi with slope -(L - N) / (L (2N + 1)).", max(slopes), 1e-12),
        at_most("At the origin all other slopes are 0, and that of xi too when L = N.", max(others), 1e-12),
        at_most(
            "Descent from the origin with eight pairs keeps the stated times.",
            max(away),
            2,
            "% away, worst of 12",
            "First below 0.99 ln L, 1.02 ln N, ln N / 2 and 0.1: " + "; ".join(rows) + ".",
        ),
        at_most("With as many labels as pairs it never leaves the origin.", still, 0, "largest parameter"),
    ]
