"""TidalDecode: positions chosen in one layer serve the layers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import fmean

from cenote.attention import Recipe
from cenote.backbones.embedded_language import load_embedded_language
from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.rows_figure import draw_rows
from cenote.reproductions.tidal_decode_exact import exact_findings, speed_finding
from cenote.reproductions.tidal_decode_worlds import (
    SHAKESPEARE,
    STORIES,
    STORIES_TEXT,
    Subject,
    neighbour_overlap,
    peers,
    retrieval,
    subjects,
    text_losses,
)
from cenote.worlds.planted_facts import PlantedFacts

CLAIM = (
    "In decoding, the positions that matter to one layer matter to those behind it: chosen twice in the whole model, a "
    "few per cent of the context decode as well as all of it."
)
SHARE = 0.1
FACTS = (0.01, 0.02, 0.05)
HOST = (
    "The shipped language model: 8 layers, 6 query over 3 key-value heads of 16, context 1024. The prompt is dense, "
    "then tokens come one by one; peers have the same dense layers. The first choice is where the paper has it, the "
    "second was tuned on other text."
)

Losses = list[dict[str, float]]


def run(settings: Settings) -> list[Finding]:
    count, steps, documents = (6, 48, 12) if settings.quick else (16, 256, 64)
    found: list[Finding] = []
    several = subjects(settings)
    for subject in several:
        budget = round(SHARE * subject.length)
        losses: Losses = []
        overlaps = []
        for seed in settings.seeds:
            settings.progress(f"{subject.name} decoded at 10 % of the context, seed {seed}")
            ids = subject.stretches(count, seed)
            losses.append(text_losses(subject.model, ids, steps, peers(subject, budget, seed)))
            overlaps.append(neighbour_overlap(subject, ids[:2], 8, budget))
        found += perplexity_findings(losses, subject.name, central=not found)
        found.append(overlap_finding(overlaps, subject.name))
    for subject in several[:2]:
        found += retrieval_findings(subject, documents, settings)
    settings.progress("exact properties and speed")
    return [*found, *exact_findings(several[0].model, several[0].stretches(1, 0)), speed_finding()]


def perplexity_findings(runs: Losses, text: str, central: bool = False) -> list[Finding]:
    """Perplexities of decoding, one run a seed."""

    def more(name: str, than: str = "dense") -> list[float]:
        return [100 * (exp(run[name] - run[than]) - 1) for run in runs]

    means = "; ".join(f"{name} {fmean(exp(run[name]) for run in runs):.2f}" for name in runs[0])
    where = f"On {text} at 10 % of the context"
    shares = {name: [_excess(run, name) for run in runs] for name in ("window", "random sets")}
    unit = "% more perplexity"
    return [
        finding(
            f"{where}, TidalDecode's perplexity is within a few per cent of dense decoding's.",
            "at most 5 % more",
            more("TidalDecode"),
            lambda v: v <= 5,
            paper="close to dense on PG19 (figures only)" if central else "",
            unit=unit,
            note=f"{HOST if central else ''} Mean perplexities: {means}.".strip(),
        ),
        *(
            finding(
                f"{where}, what TidalDecode loses against dense decoding is a small part of what {peer} loses.",
                "at most half",
                values,
                lambda v: v <= 0.5,
                unit=f"loss over that of {peer}",
                note="Of the same size, with 4 first tokens as sinks." if peer == "window" else "Of the same size.",
            )
            for peer, values in shares.items()
        ),
        finding(
            f"{where}, sets taken over from an earlier layer are as good as each layer's own best ones.",
            "within 2 % of their perplexity",
            more("TidalDecode", "own sets in every layer"),
            lambda v: v <= 2,
            unit=unit,
        ),
        finding(
            f"{where}, a second choice in the middle of the model is better than none.",
            "above 0 %",
            more("no second choice", "TidalDecode"),
            lambda v: v > 0,
            unit=unit,
            note="What the model that chooses once has more.",
        ),
    ]


def _excess(run: dict[str, float], peer: str) -> float:
    lost = run[peer] - run["dense"]
    return (run["TidalDecode"] - run["dense"]) / lost if lost > 0 else float("inf")


def overlap_finding(values: Sequence[float], text: str) -> Finding:
    """How much neighbouring layers agree."""
    return finding(
        f"On {text}, the sets that neighbouring layers would choose, head by head, overlap more than chance.",
        "at least 2x chance",
        values,
        lambda v: v >= 2,
        paper="consecutive layers share most of them (figure)",
        unit="x chance",
        note="Sets of 10 % of the context, so chance is 10 % and 10x would be equal sets.",
    )


def retrieval_findings(subject: Subject, documents: int, settings: Settings) -> list[Finding]:
    """Planted facts found with 1 to 5 % of the context."""
    facts = PlantedFacts(load_embedded_language()[1])
    first, second = subject.choose
    runs: Losses = []
    for seed in settings.seeds:
        settings.progress(f"planted facts, choosing in layers {first} and {second}, seed {seed}")
        recipes: dict[str, Recipe | None] = {"dense": None}
        for share in FACTS:
            others = peers(subject, round(share * subject.length), seed)
            recipes |= {f"{name} {share:.0%}": others[name] for name in ("TidalDecode", "window")}
        runs.append(retrieval(subject.model, facts.batch(documents, subject.length, seed=seed), recipes))
    found = []
    for share in FACTS:
        means = ", ".join(
            f"{name} {fmean(r[name] for r in runs):.0f} %"
            for name in runs[0]
            if name.endswith(("dense", f" {share:.0%}"))
        )
        ours, window = ([r["dense"] - r[f"{name} {share:.0%}"] for r in runs] for name in ("TidalDecode", "window"))
        words = f"with {share:.0%} of {subject.length} tokens, choosing in layers {first} and {second}"
        found += [
            finding(
                f"Planted facts are found {words} as often as by dense decoding.",
                "at most 5 points less",
                ours,
                lambda v: v <= 5,
                paper="full accuracy at 1 % and 0.1 % of 10k and 100k tokens",
                unit="points lost",
                note=f"{means}. Question and answer are decoded step by step.",
            ),
            finding(
                f"A window of the same size does not find them, {words}.",
                "at least 30 points less than dense",
                window,
                lambda v: v >= 30,
                unit="points lost",
            ),
        ]
    return found


REPRODUCTION = Reproduction("tidal-decode", CLAIM, run, draw_rows, needs=(STORIES, STORIES_TEXT, SHAKESPEARE))
