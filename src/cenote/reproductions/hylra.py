"""HyLRA: layers that reuse an earlier layer's choice of keys, by a plan made of measured overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import exp
from statistics import fmean

import torch
from torch import Tensor

from cenote.attention.hylra import HyLRA
from cenote.attention.plan import LayerPlan
from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.hylra_cost import Decoding, layer_costs
from cenote.reproductions.hylra_exact import exact_findings
from cenote.reproductions.hylra_figure import draw_hylra, matrix_note
from cenote.reproductions.hylra_models import (
    STORIES,
    STORIES_TEXT,
    Judge,
    Quality,
    Trained,
    calibration,
    evaluation,
    free_overlap,
    rivals,
    trained_models,
)
from cenote.reproductions.timing import time_ratio

CLAIM = (
    "With a plan made of measured overlaps, layers can reuse the keys that an earlier layer chose at hardly any loss: "
    "at equal cost it is no worse than evenly spaced sources and better than random ones."
)
TOLERANCE = 0.005
"""Nats per token within which two plans count as equally good: half a per cent of perplexity."""


@dataclass(frozen=True)
class Run:
    """One seed on one model: the calibrated recipe, the free overlaps, the qualities of the plans."""

    recipe: HyLRA
    overlap: Tensor
    chance: float
    dense: Quality
    planned: Quality
    own: Quality
    even: Quality
    uniform: Quality
    sources: Quality
    plans: Quality

    @property
    def adjacent(self) -> list[float]:
        """Overlap of each layer with the one before, averaged over heads."""
        return self.overlap.mean(dim=0).diagonal(offset=1).tolist()


def run(settings: Settings) -> list[Finding]:
    found: list[Finding] = []
    models = trained_models(settings.quick, settings.data_dir)
    for trained in models:
        runs = []
        for seed in settings.seeds:
            settings.progress(f"{trained.name}, seed {seed}")
            runs.append(measure(trained, seed, 8 if settings.quick else 16))
        found += [*quality_findings(trained, runs), *overlap_findings(trained, runs)]
    settings.progress("exact properties and costs")
    smallest = models[0]
    return [
        *found,
        *exact_findings(smallest.model, evaluation(smallest, 0, 2)[:, :200]),
        *cost_findings(settings.quick),
    ]


def measure(trained: Trained, seed: int, texts: int) -> Run:
    """Calibrate on two pieces of text and decode others under the plan and its rivals."""
    recipe = trained.recipe.calibrate(trained.model, calibration(trained, seed))
    plan = recipe.plan
    assert isinstance(plan, LayerPlan)
    judge, others = Judge(trained, seed, texts), rivals(plan, seed)
    return Run(
        recipe,
        *free_overlap(trained, seed),
        judge.dense,
        judge(plan),
        judge(LayerPlan(("select",) * len(plan))),
        judge(others.even),
        judge(others.uniform),
        judge.mean(others.sources) if others.sources else judge(plan),
        judge.mean(others.plans),
    )


def quality_findings(trained: Trained, runs: Sequence[Run]) -> list[Finding]:
    """The plan against its rivals at equal cost; differences are rival minus planned."""

    def lead(name: str, of: str = "nll") -> list[float]:
        return [getattr(getattr(each, name), of) - getattr(each.planned, of) for each in runs]

    kinds = ("dense", "planned", "own", "even", "uniform", "sources", "plans")
    means = ", ".join(
        f"{name} {exp(fmean(getattr(r, name).nll for r in runs)):.2f} / "
        f"{fmean(getattr(r, name).divergence for r in runs):.4f}"
        for name in kinds
    )
    plans = "; ".join(" ".join(_roles(each)) for each in runs)
    raised = sorted({each.recipe.note for each in runs if each.recipe.note})
    note = (
        f"Perplexity / divergence from dense predictions in nats: {means} (own: every layer selects; even: same full "
        "layers; uniform: the first layers full; sources: the mean of random ones; plans: full layers random as well). "
        f"Plans by seed: {plans}. {' '.join(raised)}"
    ).strip()
    where = f"In {trained.name}, planned sources"
    nats = "nats per token"
    alike = f"at least -{TOLERANCE} ({nats})"
    return [
        finding(
            f"{where} give a perplexity no worse than evenly spaced ones behind the same full layers.",
            alike, lead("even"), lambda v: v >= -TOLERANCE, unit=nats, note=note,
            paper="less than 1 % loss of accuracy (abstract)",
        ),
        finding(
            f"{where} give a perplexity no worse than the first layers full and evenly spaced sources (uniform reuse).",
            alike, lead("uniform"), lambda v: v >= -TOLERANCE, unit=nats,
        ),
        finding(
            f"{where} give a clearly better perplexity than random sources behind the same full layers.",
            f"above {TOLERANCE} ({nats})", lead("sources"), lambda v: v > TOLERANCE, unit=nats,
        ),
        finding(
            f"{where} give a clearly better perplexity than plans that are random altogether.",
            f"above {TOLERANCE} ({nats})", lead("plans"), lambda v: v > TOLERANCE, unit=nats,
        ),
        finding(
            f"{where} stay nearer to dense predictions than random plans do.",
            "above 0 (nats of divergence)", lead("plans", "divergence"), lambda v: v > 0, unit="nats of divergence",
        ),
        finding(
            f"{where} cost little perplexity against dense decoding.",
            "at most 0.01 (nats per token, 1 %)", [-v for v in lead("dense")], lambda v: v <= 0.01, unit=nats,
            paper="less than 1 % loss of accuracy (abstract)",
        ),
        finding(
            f"In {trained.name}, the first layers come out as full.",
            "every full layer comes before every other one",
            [float(_first(each)) for each in runs],
            lambda v: v == 1,
            unit="1 if so",
        ),
    ]  # fmt: skip


def overlap_findings(trained: Trained, runs: Sequence[Run]) -> list[Finding]:
    """Overlap of neighbouring layers' free choices against that of random sets, and along the depth."""
    mean = torch.stack([each.overlap.mean(dim=0) for each in runs]).mean(dim=0)
    chance = fmean(each.chance for each in runs)
    note = f"Sets without fixed chunks, {chance:.1%} of the keys; mean over heads, steps and seeds. "
    return [
        finding(
            f"In {trained.name}, neighbouring layers' free choices overlap more than random sets.",
            "at least 2 times the share of keys that is chosen",
            [fmean(each.adjacent) / each.chance for each in runs],
            lambda v: v >= 2,
            unit="x",
            note=note + matrix_note(mean.tolist(), _roles(runs[0])),
        ),
        finding(
            f"In {trained.name}, the overlap of neighbours grows with depth beyond the first layers.",
            "a positive correlation with depth from layers 1 and 2 on",
            [_correlation(each.adjacent[1:]) for each in runs],
            lambda v: v > 0,
            unit="correlation",
            note="By depth: " + ", ".join(f"{v:.2f}" for v in mean.diagonal(offset=1).tolist()) + ".",
        ),
    ]


def cost_findings(quick: bool) -> list[Finding]:
    """One layer's attention at 16 thousand keys; a model by its share of reusing layers."""
    costs = layer_costs(16384)
    decoding = Decoding(8192 if quick else 16384)
    rounds = 5 if quick else 9
    shares = (0, 3, 6)
    plans = [decoding.plan(reuse) for reuse in shares]
    ratios = [time_ratio(decoding.steps, partial(decoding.steps, plan), rounds, 1) for plan in plans]
    steps = "; ".join(f"{reuse} of 8: {ratio:.2f}" for reuse, ratio in zip(shares, ratios, strict=True))
    return [
        finding(
            "A reusing layer at 10 % of 16 thousand keys costs less than a tenth of a dense one.",
            "above 10 x",
            time_ratio(costs.dense, costs.reuse, 25, 5),
            lambda v: v > 10,
            unit="x faster (layer)",
            note=f"Attention alone, {torch.get_num_threads()} thread(s); a selecting layer: "
            f"{time_ratio(costs.dense, costs.select, 9, 2):.2f} x.",
        ),
        finding(
            "A decoding step gets faster with every further reusing layer.",
            "above 0 (least gain in speed over dense from 0 to 3 to 6 reusing layers of 8)",
            min(later - before for before, later in pairwise(ratios)),
            lambda v: v > 0,
            unit="x",
            note=f"Whole random Llama with {decoding.keys} keys cached, speed over dense by reusing layers: {steps}.",
        ),
    ]


def _roles(each: Run) -> list[str]:
    assert isinstance(each.recipe.plan, LayerPlan)
    return [str(role) for role in each.recipe.plan.roles]


def _first(each: Run) -> bool:
    assert isinstance(each.recipe.plan, LayerPlan)
    full = each.recipe.plan.layers("full")
    return full == tuple(range(len(full)))


def _correlation(values: Sequence[float]) -> float:
    depth = torch.arange(float(len(values)))
    return float(torch.corrcoef(torch.stack([depth, torch.tensor(values)]))[0, 1])


REPRODUCTION = Reproduction("hylra", CLAIM, run, draw_hylra, needs=(STORIES, STORIES_TEXT))
