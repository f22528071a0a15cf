"""What holds of COSTARR, its baselines and its measures whatever the data."""

from __future__ import annotations

import torch
from torch import Tensor

from cenote.inspection import CoStarr
from cenote.ops.open_set import auoscr, auroc, best_threshold, metric_cosine, open_set_accuracy, oscr_curve
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings


def exact_findings() -> list[Finding]:
    """The worked example, the reference files, the identity, the invariances, the measures."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 16, generator=g), torch.randn(5, generator=g)
    labels = torch.arange(5).repeat(40)
    features = torch.randn(200, 16, generator=g) + 0.7 * weight[labels]
    test = torch.randn(300, 16, generator=g) + 0.2
    return [
        *_example(),
        *golden_findings("costarr"),
        *_identity(weight, test),
        *_invariances(weight, bias, features, labels, test),
        *_measures(),
    ]


def _example() -> list[Finding]:
    train = torch.tensor([[2.0, 1.0], [4.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    score = CoStarr(torch.eye(2), torch.zeros(2)).fit(train, torch.tensor([0, 0, 1, 1]))
    value = score.score(torch.tensor([[3.0, 2.0]])).item()
    claim = "The worked example of the specification scores 0.65941."
    return [finding(claim, "within 1e-5", abs(value - 0.65941), lambda v: v <= 1e-5, unit="away from 0.65941")]


def _identity(weight: Tensor, test: Tensor) -> list[Finding]:
    x, w = test.double(), weight.double()[torch.arange(len(test)) % len(weight)]
    m = x.roll(7, dims=0)
    joined = torch.cosine_similarity(torch.cat([x, w * x], dim=1), torch.cat([m, w * m], dim=1))
    away = float((metric_cosine(x, m, 1 + w.square()) - joined).abs().max())
    return [at_most("The cosine of the joined halves is a cosine of the feature in the metric 1 + W^2.", away, 1e-12)]


def _invariances(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, test: Tensor) -> list[Finding]:
    whole = CoStarr(weight, bias).fit(features, labels)
    scores = whole.score(test)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    shuffled = CoStarr(weight, bias).fit(list(zip(features[order].split(7), labels[order].split(7), strict=True)))
    perm = torch.randperm(len(weight), generator=torch.Generator().manual_seed(2))
    permuted = CoStarr(weight[perm], bias[perm]).fit(features, perm.argsort()[labels])
    renamed = perm[permuted.predict(test, -1e9)]
    stretched = torch.where((labels == 1)[:, None], 5 * features, features)
    plain, scaled = (CoStarr(weight, confidence="none").fit(x, labels).score(test) for x in (features, stretched))
    similarity = torch.cat([plain, CoStarr(weight, confidence="none").fit(features, labels).score(-100 * test)])
    return [
        at_most("Batches and the order of training items change no score.", _away(shuffled.score(test), scores), 1e-5),
        at_most("Permuting the classes changes no score.", _away(permuted.score(test), scores), 1e-5),
        at_most(
            "Permuting the classes permutes the predicted labels and nothing else.",
            float((renamed != whole.predict(test, -1e9)).sum()),
            0,
            "labels that differ",
        ),
        at_most("Scaling the items of one class leaves its template's direction.", _away(scaled, plain), 1e-5),
        at_most(
            "The shifted similarity lies between 0 and 1.",
            max(0.0, float(-similarity.min()), float(similarity.max()) - 1),
            0,
            "outside by",
        ),
    ]


def _measures() -> list[Finding]:
    gaps, above, thresholds = [], [], []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(-1, 4, (80,), generator=g)
        scores = ((torch.randn(80, generator=g) + (labels >= 0)) * 3).round() / 3  # many ties
        guesses = torch.where(torch.rand(80, generator=g) < 0.7, labels.clamp_min(0), 1)
        gaps.append(abs(auoscr(oscr_curve(scores, labels, labels)) - auroc(scores, labels)))
        accuracy = float((guesses == labels)[labels >= 0].double().mean())
        above.append(auoscr(oscr_curve(scores, guesses, labels)) - accuracy)
        candidates = [*sorted(set(scores.tolist())), float("inf")]
        best = max(open_set_accuracy(scores, guesses, labels, t) for t in candidates)
        found, value = best_threshold(scores, guesses, labels)
        smallest = next(t for t in candidates if open_set_accuracy(scores, guesses, labels, t) >= best - 1e-12)
        thresholds.append(0.0 if found == smallest and abs(value - best) < 1e-12 else 1.0)
    return [
        at_most("AUOSCR is AUROC where all knowns are classified correctly.", max(gaps), 1e-12),
        at_most("AUOSCR is at most the closed-set accuracy.", max(above), 0, "above it"),
        at_most(
            "The threshold search of OOSA finds what brute force finds, the smallest of equals.",
            sum(thresholds),
            0,
            "of 20 searches differ",
        ),
    ]


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
