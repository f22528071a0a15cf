"""Numbers of the report against scikit-learn and plain definitions."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, mean_absolute_error, r2_score, recall_score

from cenote.report import figures


def dominated(cost, score, i):
    return any(
        cost[j] <= cost[i] and score[j] >= score[i] and (cost[j] < cost[i] or score[j] > score[i])
        for j in range(len(cost))
    )


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_is_the_undominated_points(seed):
    rng = np.random.default_rng(seed)
    cost, score = rng.integers(1, 8, 25).astype(float), rng.integers(0, 8, 25).astype(float)
    front = figures.pareto_front(cost, score)
    assert sorted(front) == [i for i in range(25) if not dominated(cost, score, i)]
    assert list(cost[front]) == sorted(cost[front])


def test_pareto_front_leaves_out_undefined_points():
    assert figures.pareto_front(np.array([1.0, np.nan, 2.0]), np.array([0.1, 0.9, np.nan])) == [0]


def test_calibration_by_hand():
    confidence = np.array([0.0, 0.05, 0.1, 0.95, 1.0])
    correct = np.array([True, False, False, True, True])
    result = figures.calibration_bins(confidence, correct, bins=10)
    assert result.counts.tolist() == [3, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    np.testing.assert_allclose(result.confidence[[0, 9]], [0.05, 0.975])
    np.testing.assert_allclose(result.accuracy[[0, 9]], [1 / 3, 1.0])
    assert np.isnan(result.accuracy[1])
    assert result.ece == pytest.approx(3 / 5 * (1 / 3 - 0.05) + 2 / 5 * 0.025)


def test_calibration_of_a_calibrated_forecast_is_near_zero_and_overconfidence_is_not():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    honest = figures.calibration_bins(confidence, rng.random(200_000) < confidence)
    assert honest.ece < 0.006
    boastful = figures.calibration_bins(np.full(1000, 0.9), np.arange(1000) < 500)
    assert boastful.ece == pytest.approx(0.4)


@pytest.mark.parametrize("confidence", [[], [0.2, 1.5], [-0.1, 0.5], [np.nan, 0.5]])
def test_calibration_refuses_what_is_no_probability(confidence):
    with pytest.raises(ValueError, match="confidences in"):
        figures.calibration_bins(np.array(confidence, dtype=float), np.ones(len(confidence), dtype=bool))


def test_confusion_and_class_accuracy_pool_seeds():
    rng = np.random.default_rng(1)
    probabilities, targets = rng.random((3, 50, 4)), rng.integers(0, 4, 50)
    matrix = figures.confusion(probabilities, targets)
    predicted = probabilities.argmax(-1)
    np.testing.assert_array_equal(matrix, sum(confusion_matrix(targets, p, labels=range(4)) for p in predicted))
    recall = recall_score(np.tile(targets, 3), predicted.ravel(), average=None)
    np.testing.assert_allclose(figures.per_class_accuracy(matrix), recall)
    confidence, correct = figures.top_confidence(probabilities, targets)
    assert correct.mean() == pytest.approx(np.trace(matrix) / matrix.sum())
    np.testing.assert_allclose(confidence, probabilities.max(-1).ravel())


def test_class_without_test_items_has_no_accuracy():
    matrix = np.array([[3, 1], [0, 0]])
    np.testing.assert_array_equal(figures.per_class_accuracy(matrix), [0.75, np.nan])


def test_confused_pairs_are_mistakes_only_and_sorted():
    matrix = np.array([[8, 2, 0], [0, 10, 0], [1, 0, 1]])
    assert figures.confused_pairs(matrix) == [(2, 0, 0.5), (0, 1, 0.2)]
    assert figures.confused_pairs(np.diag([3, 4])) == []


def test_label_scores_against_sklearn():
    rng = np.random.default_rng(2)
    probabilities, targets = rng.random((2, 40, 3)), (rng.random((40, 3)) < 0.4).astype(np.float32)
    targets[:, 2] = 0
    scores = figures.label_scores(probabilities, targets)
    expected = np.mean(
        [[average_precision_score(targets[:, c], p[:, c]) for c in range(2)] for p in probabilities], axis=0
    )
    np.testing.assert_allclose(scores.average_precision[:2], expected)
    assert np.isnan(scores.average_precision[2])
    assert np.isnan(scores.recall[2])
    positive = np.tile(targets[:, 0], 2)
    assert scores.recall[0] == pytest.approx(recall_score(positive, (probabilities[..., 0] >= 0.5).ravel()))


def test_residuals_against_sklearn():
    rng = np.random.default_rng(3)
    targets = rng.normal(size=30)
    values = targets[None, :, None] + rng.normal(size=(2, 30, 1))
    result = figures.residuals(values, targets)
    assert result.r2 == pytest.approx(np.mean([r2_score(targets, v[:, 0]) for v in values]))
    assert result.mae == pytest.approx(np.mean([mean_absolute_error(targets, v[:, 0]) for v in values]))
    assert result.rmse == pytest.approx(np.sqrt(np.mean((values[..., 0] - targets) ** 2)))
