"""EchoAtt: layers that attend alike share one attention map, and distillation repairs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from cenote.integrations.echo_att_model import share_attention
from cenote.reproductions.base import Finding, Reproduction, Settings, finding
from cenote.reproductions.echo_att_exact import exact_findings
from cenote.reproductions.echo_att_speed import speed_findings
from cenote.reproductions.echo_att_worlds import (
    BOOKS,
    SHAKESPEARE,
    STORIES,
    Measured,
    Subject,
    damage,
    embedded,
    measure,
    random_sets,
    retrieval,
    shakespeare,
    stories,
)
from cenote.reproductions.rows_figure import draw_rows
from cenote.tuning.echo_att import EchoAttStage, continue_training, distill

CLAIM = (
    "Layers with similar attention maps can share one, and distillation followed by a little continued training "
    "repairs the model better than continued training alone."
)
RATIOS = (0.25, 0.5, 0.75)
RATE = 1e-3
RATE_NOTE = (
    "Rate 1e-3 for all, the better of 3e-4 and 1e-3 for continued training on a seed that is not judged here; stage 2 "
    "takes a fifth of the updates, as in the paper. Where continued training ends below the dense loss, it teaches "
    "what the teacher had not learnt, and the comparison says as much about the teacher as about the method."
)
PAPER_TRAINING = "41.55 against 39.51 (average of six tasks, TinyLlama, 41 % of layers)"


def run(settings: Settings) -> list[Finding]:
    data, seeds = settings.data_dir, settings.seeds
    have = {name: data is not None and (data / name).is_file() for name in (BOOKS, STORIES, SHAKESPEARE)}
    subjects = [embedded(seed, data) for seed in seeds]
    trained: list[Finding] = []
    if have[BOOKS]:
        trained += training_findings("the embedded language model", subjects, seeds, settings)
    if have[SHAKESPEARE] and not settings.quick:
        letters = []
        for seed in seeds:
            settings.progress(f"a teacher on tiny Shakespeare, seed {seed}")
            letters.append(shakespeare(seed, data, 1200))  # type: ignore[arg-type]
        trained += training_findings("a letter model of tiny Shakespeare", letters, seeds, settings)
        trained += choice_findings("a letter model of tiny Shakespeare", letters, seeds, settings)
    settings.progress("sharing without training")
    found = choice_findings("the embedded language model", subjects, seeds, settings)
    found += retrieval_findings(subjects, seeds, 16 if settings.quick else 32)
    if have[STORIES]:
        found += choice_findings("stories260K", [stories(data)], seeds[:1], settings)  # type: ignore[arg-type]
    settings.progress("speed and exact properties")
    return [*trained, *found, *speed_findings(quick=settings.quick), *exact_findings()]


def choice_findings(name: str, subjects: Sequence[Subject], seeds: Sequence[int], settings: Settings) -> list[Finding]:
    """Damage without training: by ratio, and by which layers share."""
    alike = [subject.similarity for subject in subjects]
    dense = [measure(subject.model, subject.judged).loss for subject in subjects]
    layers = subjects[0].model.config.num_hidden_layers
    lost: dict[str, dict[float, list[float]]] = {
        kind: {ratio: [] for ratio in RATIOS} for kind in ("similar", "first", "random")
    }
    chosen = []
    for subject, seen, loss, seed in zip(subjects, alike, dense, seeds, strict=True):
        for ratio in RATIOS:
            similar = seen.choose(ratio)
            chosen.append(f"{ratio:.0%}: {', '.join(map(str, similar))}")
            sets = random_sets(layers, len(similar), 4 if settings.quick else 35, seed)
            lost["similar"][ratio].append(damage(subject, similar, loss))
            lost["first"][ratio].append(damage(subject, tuple(range(1, len(similar) + 1)), loss))
            lost["random"][ratio].append(fmean(damage(subject, each, loss) for each in sets))
    where = f"dense loss {fmean(dense):.3f} nats; layers by similarity {'; '.join(dict.fromkeys(chosen))}."
    table = "; ".join(
        f"{kind} " + ", ".join(f"{ratio:.0%} {fmean(values):.3f}" for ratio, values in rows.items())
        for kind, rows in lost.items()
    )

    def each(kind: str) -> list[list[float]]:
        return [list(row) for row in zip(*lost[kind].values(), strict=True)]

    found = [
        finding(
            f"Sharing a quarter of the layers of {name} without training raises its loss.",
            "above 0 nats",
            lost["similar"][0.25],
            lambda v: v > 0,
            unit="nats",
            note=f"Mean damage in nats by kind of choice: {table}; {where}",
        ),
        finding(
            f"The damage to {name} grows from 25 % to 50 % to 75 % of layers.",
            "above 0 nats at the smaller step",
            [min(after - before for before, after in pairwise(row)) for row in each("similar")],
            lambda v: v > 0,
            unit="nats",
        ),
    ]
    for other, words in (("random", "random layers"), ("first", "the first layers")):
        for ratio in RATIOS:
            lead = [b - a for a, b in zip(lost["similar"][ratio], lost[other][ratio], strict=True)]
            found.append(
                finding(
                    f"At {ratio:.0%} of layers of {name}, those chosen by similarity hurt less than {words}.",
                    "above 0 nats",
                    lead,
                    lambda v: v > 0,
                    unit="nats",
                )
            )
    over = [seen.scores.mean() - _others(seen.shuffled) for seen in alike]
    found.append(
        finding(
            f"Maps of different layers of {name} are more alike than those of shuffled weights.",
            "above 0 (cosine; the paper gives no baseline)",
            [float(v) for v in over],
            lambda v: v > 0,
            unit="cosine",
            note="The premise of the paper, judged against what causality and scale alone bring: shuffled query and "
            f"key weights give {fmean(float(_others(seen.shuffled)) for seen in alike):.2f}, trained ones "
            f"{fmean(float(seen.scores.mean()) for seen in alike):.2f}.",
        )
    )
    return found


def _others(similarity: Any) -> Any:
    layers = len(similarity)
    return (similarity.sum() - layers) / (layers * (layers - 1))


def retrieval_findings(subjects: Sequence[Subject], seeds: Sequence[int], documents: int) -> list[Finding]:
    """What sharing does to looking facts up."""
    rows = []
    for subject, seed in zip(subjects, seeds, strict=True):
        shared = ((), *(subject.similarity.choose(ratio) for ratio in RATIOS))
        rows.append([retrieval(subject, layers, seed, documents) for layers in shared])
    means = [fmean(column) for column in zip(*rows, strict=True)]
    note = ", ".join(f"{ratio:.0%} {mean:.0f}" for ratio, mean in zip((0, *RATIOS), means, strict=True))
    return [
        finding(
            "Sharing half of the layers without training keeps three quarters of the planted facts that are found.",
            "at least 75 %",
            [100 * row[2] / row[0] for row in rows],
            lambda v: v >= 75,
            unit="% of the dense model's",
            note=f"Facts found in per cent by share of layers: {note}. Not a claim of the paper.",
        )
    ]


@dataclass(frozen=True)
class Outcome:
    """What one student came to, by how it was trained."""

    dense: Measured
    shared: Measured
    distilled: Measured
    both: Measured
    continued: Measured
    soft_only: Measured

    def recovered(self, which: Measured) -> float:
        """Share of the loss that sharing cost, in per cent."""
        return 100 * (self.shared.loss - which.loss) / (self.shared.loss - self.dense.loss)


def train_students(subject: Subject, seed: int, steps: int, batch: int = 8, ratio: float = 0.5) -> Outcome:
    """Three students of one teacher, each with as many updates of ``batch`` stretches."""
    assert subject.train is not None
    teacher, layers = subject.model, subject.similarity.choose(ratio)
    last = steps // 5

    def stage(updates: int, **changes: Any) -> EchoAttStage:
        return EchoAttStage(updates, batch, lr=RATE, warmup=0.1, seed=seed, **changes)

    def student() -> Any:
        return share_attention(teacher, layers).requires_grad_()

    def judged(model: Any) -> Measured:
        return measure(model, subject.judged)

    shared, distilled = student(), student()
    distill(distilled, teacher, subject.train, stage(steps - last))
    first = judged(distilled)
    continue_training(distilled, subject.train, stage(last))
    continued, soft = student(), student()
    continue_training(continued, subject.train, stage(steps))
    distill(soft, teacher, subject.train, stage(steps, weights=(0.25, 0.25, 0.0)))
    return Outcome(judged(teacher), judged(shared), first, judged(distilled), judged(continued), judged(soft))


def training_findings(
    name: str, subjects: Sequence[Subject], seeds: Sequence[int], settings: Settings
) -> list[Finding]:
    """Distillation and continued training of students with half of the layers sharing."""
    steps, batch = (40, 4) if settings.quick else (300, 8)
    runs = []
    for subject, seed in zip(subjects, seeds, strict=True):
        settings.progress(f"students of {name}, seed {seed}")
        runs.append(train_students(subject, seed, steps, batch))
    kinds = ("dense", "shared", "distilled", "both", "continued", "soft_only")
    words = ("dense", "shared", "stage 1", "stages 1 and 2", "continued training only", "stage 1 without L_H")
    table = "; ".join(
        f"{word} {fmean(getattr(r, k).loss for r in runs):.3f} ({100 * fmean(getattr(r, k).right for r in runs):.1f} %)"
        for k, word in zip(kinds, words, strict=True)
    )
    return [
        finding(
            f"On {name} with half of the layers sharing, distillation and then continued training ends lower than "
            "continued training with as many updates.",
            "above 0 nats",
            [r.continued.loss - r.both.loss for r in runs],
            lambda v: v > 0,
            paper=PAPER_TRAINING,
            unit="nats",
            note=f"Loss in nats (right next tokens) after {steps} updates of {batch} stretches: {table}. {RATE_NOTE}",
        ),
        finding(
            f"The same for {name} in right next tokens.",
            "above 0 points",
            [100 * (r.both.right - r.continued.right) for r in runs],
            lambda v: v > 0,
            unit="points",
        ),
        finding(
            f"Both stages recover most of the loss that sharing costs {name}.",
            "above 50 %",
            [r.recovered(r.both) for r in runs],
            lambda v: v > 50,
            unit="% recovered",
        ),
        finding(
            f"Stage 1 alone, with the paper's weights, recovers most of the loss that sharing costs {name}.",
            "above 50 %",
            [r.recovered(r.distilled) for r in runs],
            lambda v: v > 50,
            unit="% recovered",
            note="Half of the printed loss asks for certainty about the teacher's likeliest token, which sharpens the "
            "distributions of a small model.",
        ),
        finding(
            f"Stage 1 without L_H recovers most of the loss that sharing costs {name}.",
            "above 50 %",
            [r.recovered(r.soft_only) for r in runs],
            lambda v: v > 50,
            unit="% recovered",
            note="Not a setting of the paper: the same weights of L_I and L_S.",
        ),
    ]


REPRODUCTION = Reproduction("echo-att", CLAIM, run, draw_rows, needs=(BOOKS, STORIES, SHAKESPEARE))
