"""Scores of the judged tasks against scipy and scikit-learn."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import homogeneity_completeness_v_measure, ndcg_score

from cenote.data.judged import Labels, Pairs, Relevance
from cenote.probe.judged_scores import judge_of, pair_cosines, pearson, spearman, v_measure
from cenote.probe.judged_vectors import Vectors


def vectors(items=40, width=5, seed=0):
    table = torch.randn(items, width, generator=torch.Generator().manual_seed(seed))
    return Vectors(table, np.arange(items))


def pairs(count=200, items=40, binary=False):
    generator = np.random.default_rng(0)
    value = generator.integers(0, 2, count).astype(float) if binary else generator.random(count)
    return Pairs(generator.integers(0, items, count), generator.integers(0, items, count), value)


def test_correlations_are_scipys():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 5, 60).astype(float), generator.random(60)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert spearman(np.ones(5), b[:5]) == 0.0


@pytest.mark.parametrize("clusters", [1, 3, 9])
def test_v_measure_is_scikit_learns(clusters):
    generator = np.random.default_rng(clusters)
    labels, found = generator.integers(0, 4, 80), generator.integers(0, clusters, 80)
    homogeneity, completeness, v = homogeneity_completeness_v_measure(labels, found)
    assert v_measure(found, labels) == pytest.approx((v, homogeneity, completeness), abs=1e-12)


def test_similarity_takes_any_monotone_scale():
    judge = judge_of("similarity", pairs())
    outputs = judge.outputs(vectors())
    assert judge.score(outputs, judge.targets) == pytest.approx(judge.score(np.exp(outputs), judge.targets))
    assert judge.figures(outputs)["pearson"] == pytest.approx(stats.pearsonr(outputs, judge.targets).statistic)
    perfect = judge.figures(judge.targets * 2 + 1)
    assert perfect["pearson"] == pytest.approx(1.0)


def test_cosines_do_not_depend_on_length_and_keep_their_sign():
    some = vectors()
    longer = Vectors(some.table * torch.rand(40, 1), some.place)
    np.testing.assert_allclose(pair_cosines(some, pairs()), pair_cosines(longer, pairs()), atol=1e-6)
    assert pair_cosines(some, pairs()).min() < 0


def test_verification_perfect_and_by_chance():
    judge = judge_of("verification", pairs(binary=True), p_target=0.1)
    assert judge.score(judge.targets, judge.targets) == 1.0
    assert judge.score(np.zeros(200), judge.targets) == 0.5
    figures = judge.figures(judge.targets)
    assert (figures["eer"], figures["min_dcf"], figures["p_target"], figures["dcf_threshold"]) == (0.0, 0.0, 0.1, 1.0)
    assert 0.3 < judge.score(judge.outputs(vectors()), judge.targets) < 0.7
    with pytest.raises(ValueError, match="p_target"):
        judge_of("verification", pairs(binary=True), p_target=1.0)


def test_retrieval_is_scikit_learns_ndcg():
    generator = np.random.default_rng(0)
    query, document = np.repeat(np.arange(6), 3), np.concatenate([generator.permutation(34)[:3] for _ in range(6)])
    relevance = Relevance(np.arange(6), np.arange(6, 40), query, document, generator.integers(1, 3, 18).astype(float))
    judge = judge_of("retrieval", relevance)
    outputs = judge.outputs(vectors())
    table = torch.nn.functional.normalize(vectors().table)
    truth = np.zeros((6, 34))
    truth[query, document] = relevance.grade
    scores = (table[:6] @ table[6:].T).numpy()
    assert judge.score(outputs, judge.targets) == pytest.approx(ndcg_score(truth, scores, k=10))
    assert judge.figures(outputs)["recall@100"] == pytest.approx(1.0)


def test_clusters_of_directions():
    generator = torch.Generator().manual_seed(0)
    label = np.arange(40) % 4
    table = torch.eye(4)[label] * (1 + 5 * torch.rand(40, 1, generator=generator))
    judge = judge_of("clustering", Labels(np.arange(40), label, tuple("abcd")))
    outputs = judge.outputs(Vectors(table, np.arange(40)))
    assert outputs.shape == (40, 3)
    assert judge.score(outputs, judge.targets) == pytest.approx(1.0)
    assert judge.figures(outputs)["clusters"] == 4.0


@pytest.mark.parametrize("task", ["similarity", "verification", "clustering", "retrieval"])
def test_the_bootstrap_is_around_the_score_and_paired(task):
    judgement = {
        "similarity": pairs(), "verification": pairs(binary=True),
        "clustering": Labels(np.arange(40), np.arange(40) % 3, tuple("abc")),
        "retrieval": Relevance(np.arange(8), np.arange(8, 40), np.arange(8), np.arange(8), np.ones(8)),
    }[task]  # fmt: skip
    judge = judge_of(task, judgement)
    one = judge.outputs(vectors())
    boot = judge.bootstrap([one[None], np.stack([one, one])])
    assert boot.estimate[0] == pytest.approx(judge.score(one, judge.targets))
    low, high = np.quantile(boot.draws[0], [0.01, 0.99])
    assert low < boot.estimate[0] + 0.1
    assert high > boot.estimate[0] - 0.1
    assert high > low
    np.testing.assert_allclose(boot.draws[0], boot.draws[1])


def test_judgements_must_fit_the_task():
    with pytest.raises(ValueError, match="retrieval cannot be judged by Pairs"):
        judge_of("retrieval", pairs())


def test_the_query_itself_does_not_stand_in_the_way():
    table = torch.tensor([[1.0, 0], [1, 0], [0.9, 0.1], [0, 1]])
    relevance = Relevance(np.array([0]), np.array([1, 2, 3]), np.array([0]), np.array([1]), np.ones(1))
    vectors = Vectors(table, np.arange(4))
    second = judge_of("retrieval", relevance).outputs(vectors)[0, 3]
    alone = dataclasses.replace(relevance, excluded=np.array([[0, 0]]))
    assert (second, judge_of("retrieval", alone).outputs(vectors)[0, 3]) == (0.5, 1.0)
