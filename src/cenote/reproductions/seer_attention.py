"""SeerAttention: a learned gate picks the blocks of a prompt's attention map that are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.seer_attention_decode import compressed_from_scratch, decode_findings
from cenote.reproductions.seer_attention_exact import exact_findings
from cenote.reproductions.seer_attention_figure import CURVE, draw_seer
from cenote.reproductions.seer_attention_planted import planted_losses
from cenote.reproductions.seer_attention_worlds import (
    LEARNED,
    RATIOS,
    RULES,
    STORIES,
    STORIES_MODEL,
    Curves,
    World,
    curves,
    embedded_world,
    facts_found,
    recipes_of,
    stories_world,
    trained_gate,
)

CLAIM = (
    "A small gate, trained for minutes on a frozen model's own attention, picks the blocks that matter better than "
    "rules of thumb do, so that prompts cost a fraction of full attention with little loss."
)
DENSE = "dense attention"
JUDGED = (0.2, 0.3)
"""Densities at which the specification compares the gate with rules."""


def run(settings: Settings) -> list[Finding]:
    steps = 400 if settings.quick else 1500
    found: list[Finding] = []
    data = settings.data_dir
    if data is not None and (data / STORIES_MODEL).is_dir() and (data / STORIES).is_file():
        size = 20 if settings.quick else 64
        found += _world(settings, lambda seed: stories_world(data, seed, size), steps)
    embedded = embedded_world(12)
    if embedded is not None:
        seeds = settings.seeds[:1] if settings.quick and found else settings.seeds
        found += _world(settings, lambda seed: embedded, steps, seeds)
        found += decode_findings(embedded, seeds, steps // 2, settings.progress)
    settings.progress("planted keys and exact properties")
    return [*found, _planted(settings.seeds), *exact_findings(), compressed_from_scratch()]


def _world(
    settings: Settings, make: Callable[[int], World], steps: int, seeds: Sequence[int] | None = None
) -> list[Finding]:
    seeds = settings.seeds if seeds is None else seeds
    runs: list[Curves] = []
    found_facts: list[dict[str, float]] = []
    for seed in seeds:
        world = make(seed)
        settings.progress(f"gates of {world.name}, seed {seed}")
        learned = trained_gate(world, seed, steps)
        again = {name: runs[0][name] for name in RULES.values() if runs and name != RULES["random"]}
        runs.append(curves(world, learned, seed, known=again))
        if world.facts is not None:
            methods = recipes_of(world, learned, seed)
            counts = {name: facts_found(world, replace(each, nz_ratio=JUDGED[0])) for name, each in methods.items()}
            found_facts.append({DENSE: facts_found(world), **counts})
    found = curve_findings(runs, world.name, f"{steps} steps, blocks of {world.block_size}")
    return found + fact_findings(found_facts, world.name)


def curve_findings(runs: list[Curves], where: str, protocol: str) -> list[Finding]:
    """The gate against every rule at equal density, and how perplexity grows as density falls."""
    dense = fmean(run[LEARNED][1.0] for run in runs)
    found = []
    for ratio in JUDGED:
        for name in RULES.values():
            lead = [100 * (run[name][ratio] / run[LEARNED][ratio] - 1) for run in runs]
            found.append(
                finding(
                    f"In {where} at density {ratio:g} the learned gate loses less perplexity than {name}.",
                    "above 0 %",
                    lead,
                    lambda v: v > 0,
                    unit="% lower perplexity",
                    note=f"{protocol}. Mean perplexity: dense {dense:.3f}, learned gate "
                    f"{fmean(run[LEARNED][ratio] for run in runs):.3f}, "
                    f"{name} {fmean(run[name][ratio] for run in runs):.3f}.",
                )
            )
    half = [100 * (run[LEARNED][0.5] / run[LEARNED][1.0] - 1) for run in runs]
    found.append(
        finding(
            f"In {where} the learned gate's perplexity at density 0.5 is within 1 % of dense.",
            "at most 1 %",
            half,
            lambda v: v <= 1,
            paper="9.92 against 9.92 (Llama-3.1-8B, 32k tokens)",
            unit="% above dense",
        )
    )
    for name in (LEARNED, *RULES.values()):
        excess = [fmean(100 * (run[name][ratio] / run[name][1.0] - 1) for run in runs) for ratio in RATIOS]
        grows = [
            all(run[name][low] > run[name][high] for run in runs)
            for high, low in zip((1.0, *RATIOS), RATIOS, strict=False)
        ]
        found.append(
            Finding(
                CURVE.format(name=name, where=where),
                "above the density before it, in every run",
                tuple(excess),
                tuple(grows),
                "0.0 / 0.3 / 0.5 / 1.2 % (Llama-3.1-8B, 32k tokens)" if name == LEARNED else "",
                "% above dense",
                f"Values are at densities {', '.join(f'{ratio:g}' for ratio in RATIOS)} (mean of {len(runs)} runs).",
            )
        )
    return found


def fact_findings(runs: list[dict[str, float]], where: str) -> list[Finding]:
    """Planted facts found with the gate against dense and every rule; none where dense attention finds few."""
    if not runs or runs[0][DENSE] < 50:
        return []
    means = ", ".join(f"{name} {fmean(run[name] for run in runs):.0f}" for name in runs[0])
    return [
        finding(
            f"In {where} at density {JUDGED[0]:g} the learned gate finds as many planted facts as {name}.",
            "at least 0 points" if name != DENSE else "at most 5 points fewer",
            [run[LEARNED] - run[name] for run in runs],
            (lambda v: v >= 0) if name != DENSE else (lambda v: v >= -5),
            unit="points of facts found",
            note=f"Facts found in per cent, answers decoded with the prompt: {means}.",
        )
        for name in (DENSE, *RULES.values())
    ]


def _planted(seeds: Sequence[int]) -> Finding:
    losses = [planted_losses(seed) for seed in seeds]
    falls = [100 * (1 - fmean(run[-15:]) / fmean(run[:5])) for run in losses]
    return finding(
        "On planted keys in 1024 tokens the gate's loss falls by about a third within 150 steps.",
        "at least 30 %",
        falls,
        lambda v: v >= 30,
        unit="% of the loss",
        note="Every step sees a new draw, so nothing can be memorised. Mean of the last 15 steps against the first 5.",
    )


REPRODUCTION = Reproduction("seer-attention", CLAIM, run, draw_seer, needs=(STORIES_MODEL, STORIES))
