"""Verification error rates against counting and against scikit-learn."""

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from cenote.ops.verification import detection_curve, equal_error_rate, min_detection_cost


def trials(seed=0, count=300, decimals=1):
    """Scores with many ties, same-source trials a little higher."""
    generator = np.random.default_rng(seed)
    same = generator.random(count) < 0.3
    return np.round(generator.normal(size=count) + 0.8 * same, decimals), same


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_curve_is_what_counting_gives(decimals):
    scores, same = trials(decimals=decimals)
    curve = detection_curve(scores, same)
    assert curve.thresholds[-1] == np.inf
    assert np.array_equal(curve.thresholds[:-1], np.unique(scores))
    for threshold, accept, reject in zip(*curve, strict=True):
        assert accept == pytest.approx((scores[~same] >= threshold).mean())
        assert reject == pytest.approx((scores[same] < threshold).mean())


@pytest.mark.parametrize("seed", range(5))
def test_equal_error_rate_is_where_the_roc_meets_the_diagonal(seed):
    scores, same = trials(seed)
    false_accept, hit, _ = roc_curve(same, scores, drop_intermediate=False)
    crossing = brentq(lambda rate: 1 - rate - interp1d(false_accept, hit)(rate), 0, 1)
    assert equal_error_rate(scores, same) == pytest.approx(crossing, abs=1e-9)
    order = np.random.default_rng(1).permutation(len(scores))
    assert equal_error_rate(scores[order], same[order]) == equal_error_rate(scores, same)
    assert equal_error_rate(np.exp(scores), same) == equal_error_rate(scores, same)
    assert equal_error_rate(-scores, same) == pytest.approx(1 - equal_error_rate(scores, same))


def test_separable_reversed_and_tied_scores():
    same = np.array([False, False, True, True])
    assert equal_error_rate(np.array([1.0, 2, 3, 4]), same) == 0
    assert equal_error_rate(np.array([4.0, 3, 2, 1]), same) == 1
    assert equal_error_rate(np.ones(4), same) == 0.5
    assert equal_error_rate(np.array([1.0, 2, 2, 3]), same) == 0.25  # half of one tie on each side


@pytest.mark.parametrize(("p_target", "c_miss", "c_fa"), [(0.01, 1, 1), (0.05, 10, 1), (0.9, 1, 2)])
def test_minimum_cost_is_the_smallest_of_all_thresholds(p_target, c_miss, c_fa):
    scores, same = trials()
    costs = {
        t: p_target * c_miss * (scores[same] < t).mean() + (1 - p_target) * c_fa * (scores[~same] >= t).mean()
        for t in [*np.unique(scores), np.inf]
    }
    least = min(costs.values())
    result = min_detection_cost(scores, same, p_target, c_miss, c_fa)
    assert result.cost == pytest.approx(least / min(p_target * c_miss, (1 - p_target) * c_fa))
    assert costs[result.threshold] == pytest.approx(least)
    assert result.cost <= 1


def test_useless_scores_cost_one():
    assert min_detection_cost(np.ones(4), np.array([True, True, False, False])) == (1.0, np.inf)


def test_bad_trials_are_refused():
    scores, same = trials()
    for call, message in (
        (lambda: equal_error_rate(scores[:0], same[:0]), "need same-source and different-source trials"),
        (lambda: equal_error_rate(scores, np.ones_like(same)), "got 300 of 300 same"),
        (lambda: equal_error_rate(np.where(same, np.nan, scores), same), "scores must be finite"),
        (lambda: min_detection_cost(scores, same, p_target=1.0), "p_target must lie between"),
        (lambda: min_detection_cost(scores, same, c_fa=0.0), "costs must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
