"""Error rates of verification: do two recordings, images or texts come from the same source?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class DetectionCurve(NamedTuple):
    """Both error rates at every threshold that changes a decision; a trial is accepted where ``score >= threshold``.

    Attributes:
        thresholds: every distinct score, ascending, then infinity (accept nothing), ``(points,)``.
        false_accept: share of different-source trials accepted, from 1 down to 0.
        false_reject: share of same-source trials rejected, from 0 up to 1.
    """

    thresholds: Float[np.ndarray, "points"]
    false_accept: Float[np.ndarray, "points"]
    false_reject: Float[np.ndarray, "points"]


def detection_curve(scores: Float[np.ndarray, "trials"], same: Bool[np.ndarray, "trials"]) -> DetectionCurve:
    """False-acceptance and false-rejection rate at every threshold, by one sort.

    Trials of one score are accepted or rejected together, so the curve does not depend on the order of ties.

    Args:
        scores: similarity of each pair, larger = more alike.
        same: whether both sides of a pair have one source.

    Raises:
        ValueError: shapes differ, a score is not finite, or one of the two kinds of trial is absent.
    """
    scores, same = _trials(scores, same)
    thresholds, index = np.unique(scores, return_inverse=True)
    targets = np.bincount(index[same], minlength=len(thresholds))
    impostors = np.bincount(index[~same], minlength=len(thresholds))
    below_targets = np.concatenate([[0], np.cumsum(targets)])
    below_impostors = np.concatenate([[0], np.cumsum(impostors)])
    false_reject = below_targets / below_targets[-1]
    false_accept = (below_impostors[-1] - below_impostors) / below_impostors[-1]
    return DetectionCurve(np.append(thresholds, np.inf), false_accept, false_reject)


def equal_error_rate(scores: Float[np.ndarray, "trials"], same: Bool[np.ndarray, "trials"]) -> float:
    """The error rate (0 to 1) where false acceptance equals false rejection.

    The curve runs straight between its points, so a group of tied scores that holds both kinds of trial counts as a
    coin toss: all scores equal give 0.5. Errors as :func:`detection_curve`.
    """
    _, accept, reject = detection_curve(scores, same)
    after = int(np.argmax(reject >= accept))  # at least 1: the first point accepts everything and rejects nothing
    before = after - 1
    gap = accept[before] - reject[before]
    share = gap / (gap + reject[after] - accept[after])
    return float(reject[before] + share * (reject[after] - reject[before]))


class DetectionCost(NamedTuple):
    """The smallest detection cost and the operating point that has it."""

    cost: float
    threshold: float


def min_detection_cost(
    scores: Float[np.ndarray, "trials"],
    same: Bool[np.ndarray, "trials"],
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> DetectionCost:
    """NIST's minimum detection cost (minDCF), in units of the better of accepting all and rejecting all.

    ``min_t (c_miss p FR(t) + c_fa (1 - p) FA(t)) / min(c_miss p, c_fa (1 - p))``, so 1 means that the scores are of no
    use at this operating point. The threshold is the smallest that reaches the minimum (infinity: reject everything).

    Args:
        scores: similarity of each pair, larger = more alike.
        same: whether both sides of a pair have one source.
        p_target: prior probability of a same-source trial, between 0 and 1.
        c_miss: cost of a false rejection.
        c_fa: cost of a false acceptance.

    Raises:
        ValueError: ``p_target`` outside (0, 1), a cost that is not positive, or as :func:`detection_curve`.
    """
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must lie between 0 and 1, got {p_target}")
    if not (c_miss > 0 and c_fa > 0):
        raise ValueError(f"costs must be positive, got c_miss={c_miss}, c_fa={c_fa}")
    thresholds, accept, reject = detection_curve(scores, same)
    miss, alarm = c_miss * p_target, c_fa * (1 - p_target)
    cost = (miss * reject + alarm * accept) / min(miss, alarm)
    best = int(np.argmin(cost))
    return DetectionCost(float(cost[best]), float(thresholds[best]))


def _trials(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, same = np.asarray(scores, dtype=np.float64), np.asarray(same, dtype=bool)
    if scores.ndim != 1 or scores.shape != same.shape:
        raise ValueError(f"expected one score and one label a trial, got shapes {scores.shape} and {same.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {int((~np.isfinite(scores)).sum())} that are not")
    if same.all() or not same.any():
        raise ValueError(f"need same-source and different-source trials, got {int(same.sum())} of {len(same)} same")
    return scores, same
