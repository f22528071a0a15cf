"""Deconstructed attention: one principle of attention dropped at a time, in all layers or in every other one."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.deconstructing_attention_exact import exact_findings
from cenote.reproductions.deconstructing_attention_worlds import (
    COPYING,
    LANGUAGE_MODELS,
    RECALL,
    Language,
    Task,
    learnt_accuracy,
    learnt_language,
)
from cenote.reproductions.rows_figure import draw_rows
from cenote.worlds.characters import CharacterText

CLAIM = "Attention variants that fail when they stand in every layer work when every other layer is standard attention."
TEXT = "tiny_shakespeare/input.txt.gz"
Claims = dict[str, str]
RECALLED: Claims = {
    "RndEmbQK, standard": "above 0.95",
    "standard": "above 0.95",
    "RndEmbQK": "below 0.35",
    "StaticEmbQK": "below 0.35",
    "Non-approximate": "below 0.35",
}
COPIED: Claims = {
    "RndEmbQK": "above 0.95",
    "Non-approximate, standard": "above 0.95",
    "Non-approximate": "below 0.3",
    "MLP": "below 0.03",
}
RECALLED_TOO = (
    "Non-approximate, standard",
    "StaticEmbQK, standard",
    "Approximate, standard",
    "Approximate",
    "MLP, standard",
)
COPIED_TOO = ("standard", "StaticEmbQK", "StaticEmbQK, standard", "Approximate", "MLP, standard")
"""Further patterns of the full run, of which nothing is claimed."""
Losses = list[dict[str, Language]]


def run(settings: Settings) -> list[Finding]:
    trial = "The specification's own trial: {}; chance is {:.3f}."
    found = [
        *_accuracies(
            settings, RECALL, RECALLED, RECALLED_TOO, trial.format("1.0, 1.0, 0.23, 0.23, 0.20", RECALL.world.chance)
        ),
        *_accuracies(
            settings, COPYING, COPIED, COPIED_TOO, trial.format("1.0, 1.0, 0.15, 0.016", COPYING.world.chance)
        ),
    ]
    if not settings.quick and settings.data_dir is not None and (settings.data_dir / TEXT).is_file():
        text = CharacterText.from_file(settings.data_dir / TEXT, length=128)
        runs: Losses = []
        for seed in settings.seeds:
            runs.append({})
            for name in LANGUAGE_MODELS:
                settings.progress(f"letters: {name}, seed {seed}")
                runs[-1][name] = learnt_language(text, name, seed)
        found += language_findings(runs)
    settings.progress("exact properties")
    return [*found, *exact_findings()]


def _accuracies(settings: Settings, task: Task, claimed: Claims, more: tuple[str, ...], note: str) -> list[Finding]:
    """Accuracy of each pattern of two layers, the unclaimed ones in the first finding's note."""
    values = {}
    for variants in (*claimed, *(() if settings.quick else more)):
        settings.progress(f"{task.words}: {variants}")
        values[variants] = [learnt_accuracy(task, variants, seed) for seed in settings.seeds]
    others = ", ".join(f"{_pattern(name)} {fmean(values[name]):.2f}" for name in more if name in values)
    notes = iter([f"{note} Nothing is claimed of: {others}." if others else note])
    return [
        finding(
            f"{_pattern(variants)}: {expected} at {task.words}.",
            expected,
            values[variants],
            _rule(expected),
            unit="accuracy",
            note=next(notes, ""),
        )
        for variants, expected in claimed.items()
    ]


def _pattern(variants: str) -> str:
    return f"[{variants}]" if ", " in variants else f"[{variants}, {variants}]"


def _rule(expected: str) -> Callable[[float], bool]:
    word, _, bound = expected.partition(" ")
    return (lambda v: v > float(bound)) if word == "above" else (lambda v: v < float(bound))


def language_findings(runs: Losses) -> list[Finding]:
    """The order of the losses on letters, and what the simple layers of a hybrid are needed for."""
    table = "; ".join(f"{name} {fmean(run[name].whole for run in runs):.3f}" for name in runs[0])

    def lead(worse: str, better: str) -> list[float]:
        return [run[worse].whole - run[better].whole for run in runs]

    found: list[Finding] = []
    for worse, better, paper in (
        ("MLP", "RndEmbQK", "WikiText perplexity 993.5 and 84.8 (500M)"),
        ("MLP", "StaticEmbQK", "993.5 and 79.9"),
        ("RndEmbQK", "hybrid RndEmbQK", "84.8 and 39.3"),
        ("StaticEmbQK", "hybrid RndEmbQK", "79.9 and 39.3"),
    ):
        found.append(
            finding(
                f"On letters {better} has a smaller loss than {worse}.",
                "above 0 nats",
                lead(worse, better),
                lambda v: v > 0,
                paper=paper,
                unit="nats a letter ahead",
                note=f"Mean test loss in nats: {table}." if not found else "",
            )
        )
    for hybrid, paper in (("hybrid RndEmbQK", "39.3 and 38.1"), ("hybrid Non-approximate", "39.4 and 38.1")):
        found.append(
            finding(
                f"On letters {hybrid} is about as good as standard attention.",
                "within 0.1 nats",
                lead(hybrid, "standard"),
                lambda v: abs(v) <= 0.1,
                paper=paper,
                unit="nats a letter behind",
            )
        )
        found.append(
            finding(
                f"Without its simple layers the trained {hybrid} is lost.",
                "above 1 nat more",
                [run[hybrid].skipped - run[hybrid].whole for run in runs],  # type: ignore[operator]
                lambda v: v > 1,
                paper="chance at all tasks",
                unit="nats a letter more",
            )
        )
    return found


REPRODUCTION = Reproduction("deconstructing-attention", CLAIM, run, draw_rows, needs=(TEXT,))
