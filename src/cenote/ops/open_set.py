"""Open-set measures of scores, and the cosine that COSTARR compares with.

Scores are high for items of a known class. Labels are ``0 .. classes - 1`` for knowns and negative for unknowns. An
item is accepted as its predicted class where ``score >= threshold``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def metric_cosine(
    x: Float[Tensor, "items dim"], y: Float[Tensor, "items dim"], metric: Float[Tensor, "items dim"]
) -> Float[Tensor, "items"]:
    """Cosine of two vectors under a diagonal metric: ``sum g x y / sqrt(sum g x^2  sum g y^2)``.

    With ``g = 1 + w^2`` it is the plain cosine of ``[x; w x]`` and ``[y; w y]``, at half the width. A vector of
    length zero has cosine 0 with everything.
    """
    weighted, dot = metric * x, torch.linalg.vecdot
    own, other = dot(weighted, x), dot(metric * y, y)
    return dot(weighted, y) / (own.sqrt() * other.sqrt()).clamp_min(torch.finfo(x.dtype).tiny)


def unit(x: Float[Tensor, "*items dim"]) -> Float[Tensor, "*items dim"]:
    """``x / |x|``; a row of zeros stays zero. (OpenOOD adds an epsilon to the quotient, which leaves it NaN.)"""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


class OSCR(NamedTuple):
    """The open-set classification rate curve, one point for each distinct score, from the highest down.

    Attributes:
        thresholds: the distinct scores, descending.
        fpr: share of the unknowns that are accepted.
        ccr: share of the knowns that are accepted and classified correctly.
        coverage: share of the knowns that are accepted, rightly or wrongly classified.
    """

    thresholds: Float[Tensor, "points"]
    fpr: Float[Tensor, "points"]
    ccr: Float[Tensor, "points"]
    coverage: Float[Tensor, "points"]


def oscr_curve(scores: Float[Tensor, "items"], predictions: Int[Tensor, "items"], labels: Int[Tensor, "items"]) -> OSCR:
    """Correct classification rate against false positive rate at every threshold.

    ``CCR(t) = #{known, correct, score >= t} / #known`` and ``FPR(t) = #{unknown, score >= t} / #unknown``. Items of
    equal score are accepted together, so the order of ties does not matter. A routine in wide use appends the point
    (1, 1), which no classifier with mistakes reaches; here the curve ends at CCR = closed-set accuracy.

    Raises:
        ValueError: scores that are not finite; no known or no unknown item.
    """
    _check(scores, labels)
    thresholds, place = torch.unique(scores, return_inverse=True)
    known = labels >= 0

    def share(chosen: Tensor, total: Tensor) -> Tensor:
        """Part of ``total`` that is chosen and scores at least each threshold, highest threshold first."""
        counts = torch.bincount(place[chosen], minlength=len(thresholds))
        return counts.flip(0).cumsum(0).double() / int(total.sum())

    correct = known & (predictions == labels)
    return OSCR(thresholds.flip(0), share(~known, ~known), share(correct, known), share(known, known))


def auoscr(curve: OSCR) -> float:
    """Area under CCR over FPR by trapezoids from (0, 0); at most the closed-set accuracy."""
    return _area(curve.fpr, curve.ccr)


def auroc(scores: Float[Tensor, "items"], labels: Int[Tensor, "items"]) -> float:
    """Probability that a known scores above an unknown, ties counting half.

    Raises:
        ValueError: as :func:`oscr_curve`.
    """
    curve = oscr_curve(scores, labels, labels)
    return _area(curve.fpr, curve.coverage)


def fpr_at_tpr(scores: Float[Tensor, "items"], labels: Int[Tensor, "items"], tpr: float = 0.95) -> float:
    """Share of the unknowns accepted at the highest threshold that accepts at least ``tpr`` of the knowns.

    Raises:
        ValueError: as :func:`oscr_curve`; ``tpr`` outside ``(0, 1]``.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie above 0 and at most at 1, got {tpr}")
    curve = oscr_curve(scores, labels, labels)
    return float(curve.fpr[int((curve.coverage >= tpr - 1e-12).nonzero()[0])])


def open_set_accuracy(
    scores: Float[Tensor, "items"],
    predictions: Int[Tensor, "items"],
    labels: Int[Tensor, "items"],
    threshold: float,
    balance: float = 0.5,
) -> float:
    """Share of items treated rightly at a threshold: knowns accepted as their class, unknowns rejected.

    ``OSA(t) = (a #{known, correct, score >= t} + (1 - a) #{unknown, score < t}) / (a #known + (1 - a) #unknown)``
    with ``a = balance``; 0.5 gives the plain share. The operational open-set accuracy (OOSA) is ``OSA`` on test data
    at the threshold that :func:`best_threshold` finds on validation knowns and surrogate unknowns.

    Raises:
        ValueError: as :func:`oscr_curve`; ``balance`` not between 0 and 1.
    """
    _check(scores, labels)
    _check_balance(balance)
    known, accepted = labels >= 0, scores >= threshold
    right = int((known & (predictions == labels) & accepted).sum())
    rejected, knowns = int((~known & ~accepted).sum()), int(known.sum())
    total = balance * knowns + (1 - balance) * (len(labels) - knowns)
    return (balance * right + (1 - balance) * rejected) / total


def best_threshold(
    scores: Float[Tensor, "items"],
    predictions: Int[Tensor, "items"],
    labels: Int[Tensor, "items"],
    balance: float = 0.5,
) -> tuple[float, float]:
    """The threshold of the highest :func:`open_set_accuracy`, and that accuracy.

    Candidates are the distinct scores and infinity (reject everything); among equals the smallest is taken. For
    validation data only: a threshold chosen on test unknowns says nothing about operation.

    Raises:
        ValueError: as :func:`open_set_accuracy`.
    """
    curve = oscr_curve(scores, predictions, labels)
    _check_balance(balance)
    knowns = int((labels >= 0).sum())
    unknowns = len(labels) - knowns
    # Counts instead of shares, so that equal accuracies are equal numbers.
    right = (curve.ccr * knowns).round().cpu()
    rejected = unknowns - (curve.fpr * unknowns).round().cpu()
    gain = balance * torch.cat([right, right.new_zeros(1)]) + (1 - balance) * torch.cat(
        [rejected, rejected.new_full((1,), float(unknowns))]
    )
    candidates = torch.cat([curve.thresholds.cpu().double(), torch.full((1,), float("inf"), dtype=torch.float64)])
    best = gain.max()
    total = balance * knowns + (1 - balance) * unknowns
    return float(candidates[gain >= best - 1e-9].min()), float(best) / total


def _area(x: Tensor, y: Tensor) -> float:
    zero = x.new_zeros(1)
    return float(torch.trapezoid(torch.cat([zero, y]), torch.cat([zero, x])))


def _check(scores: Tensor, labels: Tensor) -> None:
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {int((~scores.isfinite()).sum())} that are not")
    knowns = int((labels >= 0).sum())
    if not knowns or knowns == len(labels):
        raise ValueError(
            f"open-set measures need known items (labels from 0) and unknown ones (labels below 0), got {knowns} and "
            f"{len(labels) - knowns}"
        )


def _check_balance(balance: float) -> None:
    if not 0 < balance < 1:
        raise ValueError(f"balance must lie between 0 and 1, got {balance}")
