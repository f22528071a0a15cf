"""Retrieval metrics against scikit-learn, hand-worked cases, and the plain average over all orders of ties."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from cenote.ops.retrieval import ndcg, places, recall, reciprocal_rank


def case(queries=7, documents=23, judged=40, levels=5, seed=0):
    """Scores with many ties, and graded judgements."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, (queries, documents)).astype(float)
    cells = generator.permutation(queries * documents)[:judged]
    grade = generator.integers(1, 4, judged).astype(float)
    return scores, cells // documents, cells % documents, grade


@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_ndcg_is_scikit_learns_with_ties_and_grades(k):
    scores, query, document, grade = case()
    truth = np.zeros_like(scores)
    truth[query, document] = grade
    ours = ndcg(places(scores, query, document), query, grade, len(scores), k)
    for row in range(len(scores)):
        assert ours[row] == pytest.approx(ndcg_score(truth[[row]], scores[[row]], k=k), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_recall_and_reciprocal_rank_average_over_every_order_of_ties(k):
    scores = np.array([[3.0, 2, 2, 2, 2, 1], [1, 1, 1, 1, 0, 0], [5, 5, 4, 3, 3, 3]])
    query = np.array([0, 0, 1, 1, 1, 2, 2])
    document = np.array([1, 4, 0, 2, 5, 3, 5])
    found = places(scores, query, document)
    for row in range(3):
        relevant = set(document[query == row].tolist())
        recalls, firsts = [], []
        for order in itertools.permutations(range(6)):
            if any(scores[row, a] < scores[row, b] for a, b in itertools.pairwise(order)):
                continue
            recalls.append(len(relevant & set(order[:k])) / len(relevant))
            first = next(i for i, d in enumerate(order, 1) if d in relevant)
            firsts.append(1 / first if first <= k else 0.0)
        assert recall(found, query, 3, k)[row] == pytest.approx(np.mean(recalls))
        assert reciprocal_rank(found, query, 3, k)[row] == pytest.approx(np.mean(firsts))


def test_hand_worked_without_ties():
    scores = np.array([[0.9, 0.8, 0.7, 0.6]])
    query, document, grade = np.array([0, 0]), np.array([1, 3]), np.array([1.0, 2.0])
    found = places(scores, query, document)
    expected = (1 / np.log2(3) + 2 / np.log2(5)) / (2 + 1 / np.log2(3))
    assert ndcg(found, query, grade, 1, 10)[0] == pytest.approx(expected)
    assert recall(found, query, 1, 3)[0] == 0.5
    assert reciprocal_rank(found, query, 1, 10)[0] == 0.5
    assert reciprocal_rank(found, query, 1, 1)[0] == 0.0


def test_documents_that_were_not_found_count_as_missed():
    scores, query, document, grade = case(levels=1000)
    found = places(scores, query, document)
    lost = found._replace(tied=np.where(found.above < 5, found.tied, 0))
    for k in (3, 5):
        for metric in (recall, reciprocal_rank):
            np.testing.assert_allclose(metric(lost, query, 7, k), metric(found, query, 7, k))
        np.testing.assert_allclose(ndcg(lost, query, grade, 7, k), ndcg(found, query, grade, 7, k))
    assert (recall(lost, query, 7, 23) <= recall(found, query, 7, 23)).all()


def test_queries_without_judgements_score_nothing():
    scores, query, document, grade = case(queries=3)
    found = places(scores, query, document)
    assert ndcg(found, query, grade, 5, 10)[3:].tolist() == [0, 0]
    assert recall(found, query, 5, 10)[3:].tolist() == [0, 0]
    assert reciprocal_rank(found, query, 5, 10)[3:].tolist() == [0, 0]


def test_bad_input():
    scores, query, document, grade = case()
    with pytest.raises(ValueError, match="k must be at least 1"):
        ndcg(places(scores, query, document), query, grade, 7, 0)
    scores[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        places(scores, query, document)
