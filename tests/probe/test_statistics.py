import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cenote.probe.signed_rank import comparison_table, signed_rank
from cenote.probe.statistics import (
    Bootstrap,
    bootstrap_interval,
    bootstrap_means,
    bootstrap_metric,
    holm,
    paired_difference,
    pairwise_p,
    tie_groups,
)

RNG = np.random.default_rng


def at_most(rate, trials, aim=0.05, sigmas=3):
    """Whether a rate of rejections is compatible with at most ``aim``."""
    return rate <= aim + sigmas * math.sqrt(aim * (1 - aim) / trials)


class TestBootstrap:
    def test_interval_equals_scipy(self):
        scores = RNG(0).random(300) ** 2
        ours = bootstrap_interval(scores, resamples=4000)
        theirs = stats.bootstrap(
            (scores,), np.mean, n_resamples=4000, method="percentile", rng=RNG(1)
        ).confidence_interval
        assert ours == pytest.approx(tuple(theirs), abs=0.1 * scores.std() / 300**0.5)

    def test_paired_interval_equals_scipy(self):
        a, b = RNG(0).random((2, 200))
        ours = paired_difference(a, b)
        theirs = stats.bootstrap(
            (a, b),
            lambda x, y, axis: (x - y).mean(axis),
            paired=True,
            n_resamples=4000,
            method="percentile",
            rng=RNG(1),
        ).confidence_interval
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.1 * (a - b).std() / 200**0.5)
        # A mean of 200: the t test is as good as exact.
        assert ours.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.04)

    @pytest.mark.parametrize("seeds", [1, 2, 3, 8])
    def test_spread_over_seeds_and_items_is_unbiased(self, seeds):
        """On average over worlds, the bootstrap variance is that of the mean: seeds' part and items' part."""
        rng, variances = RNG(3), []
        for world in range(300):
            scores = rng.normal(size=(seeds, 1)) * 0.5 + rng.normal(size=(1, 50))
            variances.append(bootstrap_means([scores], resamples=150, seed=world).draws.var())
        expected = (0.25 / seeds if seeds > 1 else 0) + 1 / 50
        assert np.mean(variances) == pytest.approx(expected, rel=0.15)

    def test_mean_as_a_metric_is_the_mean(self):
        scores = RNG(0).random((2, 3, 40))
        plain = bootstrap_means(scores, resamples=50)
        metric = bootstrap_metric(
            lambda p, t: float((p == t).mean()), (scores > 0.5).astype(int), np.ones(40), resamples=50
        )
        again = bootstrap_means((scores > 0.5).astype(float), resamples=50)
        moved = again.estimate - again.draws.mean(axis=1)
        np.testing.assert_allclose(metric.draws, again.draws + moved[:, None])
        np.testing.assert_allclose(metric.estimate, again.estimate)
        assert plain.draws.shape == (2, 50)

    def test_a_score_that_likes_duplicates_keeps_its_estimate_inside_the_interval(self):
        from sklearn.metrics import v_measure_score

        labels = RNG(0).integers(0, 40, 200)
        clusters = np.where(RNG(1).random(200) < 0.7, labels, RNG(2).integers(0, 40, 200))
        score = lambda found, wanted: float(v_measure_score(wanted, found))  # noqa: E731
        boot = bootstrap_metric(score, clusters[None, None], labels, resamples=200)
        low, high = np.quantile(boot.draws[0], [0.025, 0.975])
        assert low < boot.estimate[0] < high

    def test_chunks_do_not_matter_and_seeds_do(self, monkeypatch):
        scores = RNG(0).random((1, 3, 40))
        import cenote.probe.statistics as module

        first = bootstrap_interval(scores[0])
        assert first == bootstrap_interval(scores[0])
        assert first != bootstrap_interval(scores[0], seed=1)
        monkeypatch.setattr(module, "CHUNK", 40 * 7)
        assert bootstrap_interval(scores[0]) == pytest.approx(first, abs=0.02)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="same items"):
            bootstrap_means([np.ones(4), np.ones(5)])
        with pytest.raises(ValueError, match="1 that are NaN"):
            bootstrap_means([[1.0, math.nan]])
        with pytest.raises(ValueError, match="at least one method"):
            bootstrap_means([])
        with pytest.raises(ValueError, match="shape"):
            bootstrap_means([np.ones((2, 2, 2))])
        with pytest.raises(ValueError, match="same items"):
            bootstrap_means([np.ones((2, 0))])
        with pytest.raises(ValueError, match="level"):
            bootstrap_interval([1.0, 2.0], level=95)
        with pytest.raises(ValueError, match="5 targets"):
            bootstrap_metric(lambda p, t: 0.0, [np.ones((1, 5))], np.ones(4))
        with pytest.raises(ValueError, match="resamples"):
            bootstrap_means([np.ones(4)], resamples=0)


class TestPairedDifference:
    def test_about_five_percent_rejections_without_a_difference(self):
        rng, trials = RNG(0), 600
        rejected = 0
        for trial in range(trials):
            # Two readouts that agree on most items, as readouts do.
            shared, a, b = rng.random((3, 150))
            first, second = ((shared > 0.4) & (x > 0.2) for x in (a, b))
            rejected += paired_difference(first, second, resamples=300, seed=trial).p <= 0.05
        assert 0.03 <= rejected / trials <= 0.08

    def test_finds_a_difference(self):
        rng = RNG(0)
        base = rng.random((1, 400))
        result = paired_difference((base < 0.85).repeat(3, 0), (base < 0.80).repeat(3, 0))
        assert result.difference == pytest.approx(0.05, abs=0.02)
        assert result.p < 1e-3
        assert result.low > 0

    def test_equal_methods(self):
        scores = RNG(0).random((2, 30))
        assert paired_difference(scores, scores) == (0, 0, 0, 1)

    def test_p_goes_on_beyond_the_resamples(self):
        boot = bootstrap_means(
            [RNG(0).normal(1, 1, 200), RNG(1).normal(0, 1, 200), RNG(2).normal(-2, 1, 200)], resamples=100
        )
        p = pairwise_p(boot)
        assert p[0, 2] < p[0, 1] < 1 / 101
        assert (p == p.T).all()
        assert pairwise_p(bootstrap_means([np.ones(5), np.zeros(5)]))[0, 1] == 2**-4


class TestHolm:
    def test_by_hand(self):
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
        np.testing.assert_allclose(holm([0.6, 0.9]), [1.0, 1.0])
        assert holm([]).shape == (0,)

    def test_family_wise_error(self):
        p = RNG(0).random((2000, 6))
        assert at_most(np.mean([holm(row).min() <= 0.05 for row in p]), 2000)
        assert np.mean(p.min(1) <= 0.05) > 0.2

    def test_one_real_effect_leaves_the_rest_controlled(self):
        p = RNG(1).random((2000, 5))
        p[:, 0] = 1e-9
        rejected = np.array([holm(row) <= 0.05 for row in p])
        assert rejected[:, 0].all()
        assert at_most(rejected[:, 1:].any(1).mean(), 2000)

    def test_bad_input(self):
        for p in ([0.5, 1.5], [math.nan], [[0.1]]):
            with pytest.raises(ValueError, match="p-values"):
                holm(p)


class TestTieGroups:
    def test_clear_groups_in_any_order(self):
        base = RNG(0).random((1, 500))
        levels = {"b": 0.80, "a": 0.805, "d": 0.5, "c": 0.6, "c2": 0.6}
        flip = RNG(1).random((5, 500)) < 0.02
        scores = [((base < level) ^ f).astype(float) for level, f in zip(levels.values(), flip, strict=True)]
        assert tie_groups(scores) == [1, 1, 3, 2, 2]

    def test_one_method(self):
        assert tie_groups([np.ones((1, 4))]) == [1]

    def test_unequal_numbers_of_seeds(self):
        base = RNG(0).random(300)
        assert tie_groups([base, np.stack([base, base]) + 0.001 * RNG(1).normal(size=(2, 300)), base - 0.5]) == [
            1,
            1,
            2,
        ]

    def test_a_noisy_method_may_tie_where_a_steady_one_does_not(self):
        n = 400
        best = np.zeros(n)
        steady = best - 0.05 + 0.01 * RNG(0).normal(size=n)
        noisy = best - 0.06 + 2.0 * stats.norm.ppf((RNG(1).permutation(n) + 0.5) / n)
        assert tie_groups([best, steady, noisy]) == [1, 2, 1]

    def test_equal_methods_are_one_group_95_times_in_100(self):
        rng, trials = RNG(0), 300
        split = 0
        for trial in range(trials):
            shared = rng.random((1, 1, 150)) > 0.4
            scores = shared & (rng.random((5, 1, 150)) > 0.2)
            split += max(tie_groups(scores.astype(float), resamples=300, seed=trial)) > 1
        assert at_most(split / trials, trials)

    def test_of_resampled_scores(self):
        boot = bootstrap_means([RNG(0).random(100), RNG(0).random(100) - 1])
        assert isinstance(boot, Bootstrap)
        assert tie_groups(boot) == [1, 2]


class TestSignedRank:
    @pytest.mark.parametrize("n", [6, 9, 14, 25, 40])
    def test_equals_scipy(self, n):
        rng = RNG(n)
        for _ in range(10):
            a, b = rng.random((2, n))
            ours, theirs = signed_rank(a, b), stats.wilcoxon(a, b, method="exact")
            assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
            assert ours.statistic == theirs.statistic
            assert ours.wins == (a > b).sum()
            assert ours.losses == (a < b).sum()

    def test_shared_ranks_and_zeros_by_enumeration(self):
        a, b = np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), np.array([2.0, 2, 2, 2, 5, 4, 1, 2])
        result = signed_rank(a, b)
        assert (result.wins, result.losses, result.ties) == (5, 2, 1)
        ranks = stats.rankdata(np.abs((a - b)[a != b]))
        sums = [min(np.dot(s, ranks), ranks.sum() - np.dot(s, ranks)) for s in product([0, 1], repeat=7)]
        assert result.p == pytest.approx(np.mean(np.array(sums) <= result.statistic + 1e-9))
        assert result.rank_biserial == pytest.approx((ranks.sum() - 2 * result.statistic) / ranks.sum())

    @pytest.mark.parametrize(
        ("n", "least"), [(4, 0.125), (5, 0.0625), (6, 0.031), (8, 0.0078), (11, 0.00098), (14, 0.00012)]
    )
    def test_least_attainable_p(self, n, least):
        result = signed_rank(np.arange(1.0, n + 1), np.zeros(n))
        assert result.p == result.least_p == pytest.approx(least, rel=0.02)
        assert result.rank_biserial == 1
        assert bool(result.note) == (n < 6)
        if n < 6:
            assert result.note == f"{n} unequal pairs cannot reach p <= 0.05"

    def test_zeros_count_against_what_can_be_reached(self):
        assert "5 unequal pairs" in signed_rank([1, 2, 3, 4, 5, 6.0], [0, 0, 0, 0, 0, 6.0]).note
        same = signed_rank([1.0, 2.0], [1.0, 2.0])
        assert (same.p, same.least_p, same.rank_biserial, same.ties) == (1, 1, 0, 2)

    @pytest.mark.parametrize("n", [6, 10, 20])
    def test_at_most_five_percent_rejections_without_a_difference(self, n):
        a, b = RNG(n).random((2, 1500, n))
        rate = np.mean([signed_rank(x, y).p <= 0.05 for x, y in zip(a, b, strict=True)])
        assert at_most(rate, 1500)
        assert rate > 0.02

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
            signed_rank([1, 2, 3], [1, 2])
        with pytest.raises(ValueError, match="finite"):
            signed_rank([1, math.nan], [1, 2])
        with pytest.raises(ValueError, match="shapes"):
            signed_rank([], [])


class TestComparisonTable:
    frame = pd.DataFrame(RNG(0).random((8, 3)), columns=["a", "b", "c"], index=list("ABCDEFGH"))

    def test_lines(self):
        table = comparison_table(self.frame)
        assert list(zip(table["first"], table["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
        for line in table.itertuples():
            a, b = self.frame[line.first], self.frame[line.second]
            assert line.p == pytest.approx(stats.wilcoxon(a, b, method="exact").pvalue)
            assert line.difference == pytest.approx((a - b).mean())
            assert line.ci_low < line.difference < line.ci_high
            assert line.wins + line.losses == 8
        np.testing.assert_allclose(table["p_holm"], holm(table["p"]))

    def test_order_of_data_sets_does_not_matter(self):
        nested = {m: dict(sorted(s.items(), key=lambda item: hash(item[0]))) for m, s in self.frame.to_dict().items()}
        pd.testing.assert_series_equal(comparison_table(nested)["p"], comparison_table(self.frame)["p"])

    def test_unequal_data_sets_are_named(self):
        nested = self.frame.to_dict()
        del nested["b"]["C"]
        with pytest.raises(ValueError, match=r"'b' has none on \['C'\]"):
            comparison_table(nested)
        with pytest.raises(ValueError, match="two methods"):
            comparison_table(self.frame[["a"]])
