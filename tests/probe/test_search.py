"""Exact search against the plain product, FAISS against exact search, places against scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import ndcg_score

from cenote.ops.retrieval import ndcg
from cenote.probe import search as module
from cenote.probe.search import chosen_index, rank_judged, search


def case(queries=9, documents=200, width=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(queries, width, generator=generator), 3 * torch.randn(documents, width, generator=generator)


@pytest.mark.parametrize("k", [1, 10, 200, 500])
def test_exact_is_the_plain_product_in_any_blocks(k, monkeypatch):
    queries, documents = case()
    plain = (F.normalize(queries) @ F.normalize(documents).T).sort(dim=1, descending=True)
    for block in (1 << 24, 700):
        monkeypatch.setattr(module, "BLOCK", block)
        found = search(queries, documents, k, index="exact")
        assert found.documents.shape == (9, min(k, 200))
        torch.testing.assert_close(found.scores, plain.values[:, :k])
        assert torch.equal(found.documents, plain.indices[:, :k])


def test_equal_scores_stay_in_the_order_of_their_numbers():
    documents = torch.eye(4)[[0, 1, 1, 1, 0]]
    assert search(torch.eye(4)[[1]], documents, 5, index="exact").documents.tolist() == [[1, 2, 3, 0, 4]]


def test_flat_index_finds_the_same():
    pytest.importorskip("faiss")
    queries, documents = case()
    exact, flat = (search(queries, documents, 20, index=kind) for kind in ("exact", "flat"))
    torch.testing.assert_close(exact.scores, flat.scores)
    assert torch.equal(exact.documents, flat.documents)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_approximate_indices_find_most(index):
    pytest.importorskip("faiss")
    queries, documents = case(30, 3000)
    exact, found = (search(queries, documents, 10, index=kind) for kind in ("exact", index))
    both = zip(exact.documents.tolist(), found.documents.tolist(), strict=True)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in both])
    assert share > 0.8


@pytest.mark.parametrize("index", ["exact", "flat"])
def test_places_give_scikit_learns_ndcg(index):
    if index == "flat":
        pytest.importorskip("faiss")
    queries, documents = case()
    documents = torch.cat([documents, documents[:20]])  # ties
    generator = np.random.default_rng(1)
    query, document = np.repeat(np.arange(9), 4), np.concatenate([generator.permutation(220)[:4] for _ in range(9)])
    grade = generator.integers(1, 4, 36).astype(float)
    truth = np.zeros((9, 220))
    truth[query, document] = grade
    scores = (F.normalize(queries) @ F.normalize(documents).T).numpy()
    found = rank_judged(queries, documents, query, document, index=index)
    expected = [ndcg_score(truth[[row]], scores[[row]], k=10) for row in range(9)]
    np.testing.assert_allclose(ndcg(found, query, grade, 9, 10), expected, atol=1e-7)


@pytest.mark.parametrize("index", ["exact", "flat"])
def test_excluded_documents_are_out_of_the_ranking_of_their_query_only(index, monkeypatch):
    if index == "flat":
        pytest.importorskip("faiss")
    monkeypatch.setattr(module, "BLOCK", 700)  # three queries at a time
    queries, documents = case()
    query, document = np.repeat(np.arange(9), 3), np.tile([4, 50, 120], 9)
    nearest = search(queries, documents, 1, index="exact").documents[:, 0].numpy()
    excluded = np.stack([np.arange(9), nearest], axis=1)[1:]
    excluded = np.concatenate([excluded, [[3, 50]]])
    found = rank_judged(queries, documents, query, document, index=index, excluded=excluded)
    for at, (q, d) in enumerate(zip(query, document, strict=True)):
        out = excluded[excluded[:, 0] == q, 1]
        kept = np.setdiff1d(np.arange(200), out)
        if d in out:
            assert found.tied[at] == 0
            continue
        scores = (F.normalize(queries[[q]]) @ F.normalize(documents).T).numpy()[0]
        assert found.above[at] == (scores[kept] > scores[d]).sum()
        assert found.tied[at] == 1


def test_choice_by_size(monkeypatch):
    assert chosen_index(1000) == "exact"
    monkeypatch.setattr(module, "FAISS_FROM", 100)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert chosen_index(1000) == "exact"
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    assert chosen_index(1000) == "flat"


def test_bad_input():
    queries, documents = case()
    with pytest.raises(ValueError, match="k >= 1"):
        search(queries, documents, 0)
    with pytest.raises(ValueError, match="as wide as"):
        search(queries, documents[:, :3], 1)
