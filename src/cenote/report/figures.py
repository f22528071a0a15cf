"""The numbers behind the report's figures: pure functions of arrays.

Predictions carry a seed axis ``(seeds, items, outputs)``. Seeds are pooled, not averaged into an ensemble: every figure
describes what one trained readout does, as the score in the table (a mean over seeds) does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


def pareto_front(cost: Float[np.ndarray, "n"], score: Float[np.ndarray, "n"]) -> list[int]:
    """Indices of the points that no other beats, cheapest first.

    ``i`` is on the front unless some ``j`` has ``cost_j <= cost_i`` and ``score_j >= score_i`` with one of the two
    strict. Points with a NaN are never on it; of equal points all are.
    """
    known = [i for i in range(len(cost)) if np.isfinite(cost[i]) and np.isfinite(score[i])]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (cost[i], -score[i])):
        if not front or score[i] > score[front[-1]] or (score[i] == score[front[-1]] and cost[i] == cost[front[-1]]):
            front.append(i)
    return front


class Calibration(NamedTuple):
    """A reliability diagram.

    Attributes:
        edges: borders of the bins, ``(bins + 1,)``.
        counts: predictions in each bin.
        confidence: their mean confidence (NaN in an empty bin).
        accuracy: their mean correctness (NaN in an empty bin).
        ece: expected calibration error, ``sum_b counts_b / n |accuracy_b - confidence_b|``.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def calibration_bins(confidence: Float[np.ndarray, "n"], correct: Bool[np.ndarray, "n"], bins: int = 15) -> Calibration:
    """Mean confidence against accuracy in ``bins`` equal-width bins ``(low, high]`` of [0, 1]; 0 falls in the first.

    Raises:
        ValueError: no predictions, or a confidence outside [0, 1].
    """
    if not len(confidence) or not (np.min(confidence) >= 0 and np.max(confidence) <= 1 + 1e-6):
        raise ValueError("calibration needs at least one prediction, with confidences in [0, 1]")
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(index, weights=correct.astype(float), minlength=bins) / count
    gap = np.abs(accuracy - mean_confidence)
    ece = float(np.sum(np.where(count > 0, gap, 0.0) * count) / count.sum())
    return Calibration(edges, count, mean_confidence, accuracy, ece)


def top_confidence(
    probabilities: Float[np.ndarray, "seeds items classes"], targets: Int[np.ndarray, "items"]
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class and whether it is right, both ``(seeds * items,)``."""
    predicted = probabilities.argmax(axis=-1)
    return probabilities.max(axis=-1).ravel().astype(float), (predicted == targets).ravel()


def confusion(
    probabilities: Float[np.ndarray, "seeds items classes"], targets: Int[np.ndarray, "items"]
) -> Int[np.ndarray, "classes classes"]:
    """Counts with the true class in the row and the predicted one in the column, summed over seeds."""
    seeds, _, classes = probabilities.shape
    flat = np.tile(targets, seeds) * classes + probabilities.argmax(axis=-1).ravel()
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def confused_pairs(matrix: Int[np.ndarray, "classes classes"], top: int = 8) -> list[tuple[int, int, float]]:
    """The most frequent mistakes as (true, predicted, share of the true class), largest share first."""
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(share, 0.0)
    order = np.argsort(-share, axis=None, kind="stable")[:top]
    pairs = [(int(i), int(j), float(share[i, j])) for i, j in zip(*np.unravel_index(order, share.shape), strict=True)]
    return [pair for pair in pairs if pair[2] > 0]


def per_class_accuracy(matrix: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes"]:
    """Share of each true class that is recognised (recall); NaN for a class without test items."""
    with np.errstate(invalid="ignore"):
        return np.diag(matrix) / matrix.sum(axis=1)


class LabelScores(NamedTuple):
    """Quality of each label, ``(classes,)``: means over seeds, decisions at probability 0.5."""

    average_precision: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    positives: np.ndarray


def label_scores(
    probabilities: Float[np.ndarray, "seeds items classes"], targets: Shaped[np.ndarray, "items classes"]
) -> LabelScores:
    """Average precision, precision and recall of each label; NaN where a ratio has no denominator."""
    from sklearn.metrics import average_precision_score

    positive = targets > 0.5
    classes = targets.shape[1]
    ap = np.full(classes, np.nan)
    for c in np.flatnonzero(positive.any(axis=0)):
        ap[c] = np.mean([average_precision_score(positive[:, c], seed[:, c]) for seed in probabilities])
    decided = probabilities >= 0.5
    hits = (decided & positive).sum(axis=(0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = hits / decided.sum(axis=(0, 1))
        recall = hits / (positive.sum(axis=0) * len(probabilities))
    return LabelScores(ap, precision, recall, positive.sum(axis=0))


class Residuals(NamedTuple):
    """Errors of a regression, pooled over seeds and outputs."""

    predicted: np.ndarray
    target: np.ndarray
    r2: float
    mae: float
    rmse: float


def residuals(
    values: Float[np.ndarray, "seeds items outputs"], targets: Shaped[np.ndarray, "items *outputs"]
) -> Residuals:
    """Predictions beside targets; ``R^2 = 1 - sum (y - p)^2 / sum (y - mean y)^2``, mean absolute and RMS error."""
    target = np.broadcast_to(targets.reshape(values.shape[1:]), values.shape).astype(float)
    error = target - values
    centred = target - target.mean(axis=1, keepdims=True)
    spread = float((centred**2).sum())
    r2 = 1 - float((error**2).sum()) / spread if spread > 0 else float("nan")
    rmse = float(np.sqrt((error**2).mean()))
    return Residuals(values.ravel().astype(float), target.ravel(), r2, float(np.abs(error).mean()), rmse)
