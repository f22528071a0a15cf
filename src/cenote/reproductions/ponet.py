"""PoNet: poolings of three reaches in place of attention."""

from __future__ import annotations

from collections.abc import Sequence

from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.ponet_cost import cost_findings
from cenote.reproductions.ponet_exact import exact_findings
from cenote.reproductions.ponet_figure import draw_ponet
from cenote.reproductions.ponet_keyword import MODELS, RATES, keyword_accuracies
from cenote.reproductions.ponet_pretraining import Documents, novels, pre_train, stories

CLAIM = (
    "A global, a segment and a local pooling in place of attention keep most of its accuracy at a cost that grows with "
    "the length of a text instead of its square."
)
BOOKS = "books"
NOISE = 2.0
"""Points that a model without one pooling may be ahead before it counts."""

Accuracies = dict[str, list[float]]


def run(settings: Settings) -> list[Finding]:
    found: list[Finding] = []
    steps = 300 if settings.quick else 800
    accuracies: Accuracies = {}
    rates: dict[str, float] = {}
    for name, mixer in MODELS.items():
        settings.progress(f"a keyword far from the class token: {name}")
        accuracies[name], rates[name] = keyword_accuracies(mixer, settings.seeds, steps)
    protocol = (
        f"{steps} steps of 32 new texts; each has the better of the rates {RATES} on validation texts of the first "
        f"seed: {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}"
    )
    found += accuracy_findings(accuracies, "a keyword far from the class token", protocol, central=True)
    folder = None if settings.quick else settings.data_dir
    settings.progress("pre-training on generated stories")
    found += pre_training_findings("generated stories", *stories(1500, 0), settings.seeds, 300)
    if folder is not None and (folder / BOOKS).is_dir():
        settings.progress("pre-training on novels")
        found += pre_training_findings("four novels", *novels(folder / BOOKS), settings.seeds, 1200, dim=64)
    settings.progress("cost and exact properties")
    return [*found, *cost_findings(), *exact_findings()]


def accuracy_findings(accuracies: Accuracies, task: str, protocol: str = "", central: bool = False) -> list[Finding]:
    """PoNet against attention, a model that sees one token at a time, and itself with one pooling fewer."""

    def lead(one: str, other: str) -> list[float]:
        return [a - b for a, b in zip(accuracies[one], accuracies[other], strict=True)]

    means = ", ".join(f"{name} {sum(values) / len(values):.1f}" for name, values in accuracies.items())
    without = [name for name in accuracies if " without the " in name]
    return [
        finding(
            f"On {task} two layers of PoNet reach what two of softmax attention do.",
            "at most 3 points below",
            lead("PoNet", "softmax attention"),
            lambda v: v >= -3,
            paper="95.7 % of BERT's average on GLUE" if central else "",
            unit="points of accuracy",
            note=f"Mean accuracy in per cent, read at the class token: {means}. {protocol}. Where attention has not "
            "learnt the task, this says that PoNet learns it in fewer steps, not that it ends up higher.",
        ),
        finding(
            f"On {task} PoNet is ahead of the same network without mixing.",
            "above 0 points",
            lead("PoNet", "feed-forward only"),
            lambda v: v > 0,
            unit="points of accuracy",
        ),
        *(
            finding(
                f"On {task} {name} is no better than PoNet.",
                f"at most {NOISE:g} points ahead",
                lead(name, "PoNet"),
                lambda v: v <= NOISE,
                unit="points of accuracy",
            )
            for name in without
        ),
    ]


def pre_training_findings(
    corpus: str, documents: Documents, vocabulary: int, seeds: Sequence[int], steps: int, dim: int = 32
) -> list[Finding]:
    """Masked words against their frequencies, and sentence structure against guessing."""
    length = 48 if dim == 32 else 96
    runs = [pre_train(documents, vocabulary, seed, steps, dim=dim, max_length=length) for seed in seeds]
    return [
        finding(
            f"Pre-trained on {corpus}, PoNet guesses masked words better than their frequencies do.",
            "loss below that of the frequencies",
            [run.words - run.unigram for run in runs],
            lambda v: v < 0,
            unit="nats against word frequencies",
            note=f"Held-out documents, {steps} steps. Loss: {', '.join(f'{run.words:.2f}' for run in runs)}; "
            f"frequencies: {', '.join(f'{run.unigram:.2f}' for run in runs)}.",
        ),
        finding(
            f"Pre-trained on {corpus}, PoNet tells what became of a text's second half.",
            "above 33.3 % (guessing)",
            [run.structure for run in runs],
            lambda v: v > 100 / 3,
            unit="% of held-out pairs",
        ),
    ]


REPRODUCTION = Reproduction("ponet", CLAIM, run, draw_ponet, needs=(BOOKS,))
