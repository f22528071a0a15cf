"""How good a ranking of documents is, from where the relevant ones stand in it.

Only the places of relevant documents matter, so the metrics take one entry a judgement: how many documents score
strictly above the relevant one, and how many score the same (itself included). Tied documents stand in any order with
equal chance, and every metric is the exact expectation over these orders, so that it depends on scores alone and not on
how documents happen to be numbered. For nDCG this is scikit-learn's ``ndcg_score``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln


class Places(NamedTuple):
    """Where relevant documents stand.

    Attributes:
        above: documents that score strictly higher, ``(judgements,)``.
        tied: documents that score the same, itself included; 0 where it was not found at all.
    """

    above: Int[np.ndarray, "judgements"]
    tied: Int[np.ndarray, "judgements"]


def places(
    scores: Float[np.ndarray, "queries documents"], query: Int[np.ndarray, "judgements"],
    document: Int[np.ndarray, "judgements"],
) -> Places:  # fmt: skip
    """Places of the judged documents among all.

    Args:
        scores: larger = more relevant.
        query, document: row and column of each judgement.

    Raises:
        ValueError: scores that are not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got {int((~np.isfinite(scores)).sum())} that are not")
    above, tied = np.empty(len(query), dtype=np.int64), np.empty(len(query), dtype=np.int64)
    step = max(1, 2**24 // max(1, scores.shape[1]))  # rows that are compared at a time
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        rows = scores[query[part]]
        own = scores[query[part], document[part]][:, None]
        above[part], tied[part] = (rows > own).sum(axis=1), (rows == own).sum(axis=1)
    return Places(above, tied)


def ndcg(
    found: Places, query: Int[np.ndarray, "judgements"], grade: Float[np.ndarray, "judgements"], queries: int, k: int
) -> Float[np.ndarray, "queries"]:
    """Normalised discounted cumulative gain at ``k`` of each query.

    ``DCG@k = sum_{rank <= k} grade / log2(1 + rank)`` over the DCG of the best order; 0 for a query without a relevant
    document. Grades are the gains themselves, as in trec_eval (for binary judgements ``2^grade - 1`` is the same).

    Args:
        found: see :func:`places`.
        query, grade: of each judgement, grades above 0.
        queries: how many there are.
        k: depth.
    """
    _check(k)
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    tied = np.maximum(found.tied, 1)
    last = np.minimum(found.above + tied, k)
    share = (discounts[last] - discounts[np.minimum(found.above, k)]) / tied
    gained = np.bincount(query, grade * np.where(found.tied > 0, share, 0.0), minlength=queries)
    order = np.lexsort((-grade, query))
    rank = _rank_within(query[order])
    weight = np.where(rank < k, np.diff(discounts)[np.minimum(rank, k - 1)], 0.0)
    ideal = np.bincount(query[order], grade[order] * weight, minlength=queries)
    return np.divide(gained, ideal, out=np.zeros(queries), where=ideal > 0)


def recall(found: Places, query: Int[np.ndarray, "judgements"], queries: int, k: int) -> Float[np.ndarray, "queries"]:
    """Share of each query's relevant documents among the first ``k``; 0 for a query without any."""
    _check(k)
    tied = np.maximum(found.tied, 1)
    chance = np.where(found.tied > 0, np.clip(k - found.above, 0, tied) / tied, 0.0)
    count = np.bincount(query, minlength=queries)
    return np.bincount(query, chance, minlength=queries) / np.maximum(count, 1)


def reciprocal_rank(
    found: Places, query: Int[np.ndarray, "judgements"], queries: int, k: int
) -> Float[np.ndarray, "queries"]:
    """``1 / rank`` of each query's first relevant document, 0 beyond ``k``; its mean over queries is MRR@k.

    Of t documents tied for the places after ``above``, r of them relevant, the first relevant one comes j-th with
    probability ``C(t - j, r - 1) / C(t, r)``.
    """
    _check(k)
    result = np.zeros(queries)
    known = found.tied > 0
    first = np.full(queries, np.iinfo(np.int64).max)
    np.minimum.at(first, query[known], found.above[known])
    leading = known & (found.above == first[query])
    relevant = np.bincount(query[leading], minlength=queries)
    tied = np.zeros(queries, dtype=np.int64)
    tied[query[leading]] = found.tied[leading]
    for row in np.flatnonzero((relevant > 0) & (first < k)):
        t, r = int(tied[row]), int(relevant[row])
        place = np.arange(1, min(t - r + 1, k - int(first[row])) + 1)
        chance = np.exp(_log_binomial(t - place, r - 1) - _log_binomial(t, r))
        result[row] = float((chance / (first[row] + place)).sum())
    return result


def _log_binomial(n: Any, k: int) -> Any:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _rank_within(groups: np.ndarray) -> np.ndarray:
    """0, 1, ... within each run of equal numbers."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def _check(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
