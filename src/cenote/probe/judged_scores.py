"""What each judged task makes of vectors: an output a pair, query or item, a score of them, and further figures.

Vectors are compared by cosine. Outputs are kept unit by unit, so that intervals and paired tests can resample pairs
(similarity, verification), queries (retrieval) or items (clustering) the same way for every readout. Pairs that share
an item are not independent, so intervals over pairs of few items are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.stats import rankdata

from cenote.data.judged import Judgement, Labels, Pairs, Relevance
from cenote.ops.retrieval import ndcg, recall, reciprocal_rank
from cenote.ops.verification import equal_error_rate, min_detection_cost
from cenote.probe.judged_vectors import Vectors
from cenote.probe.search import Index, rank_judged
from cenote.probe.statistics import Bootstrap, bootstrap_means, bootstrap_metric
from cenote.types import JudgedTask

CLUSTER_SEEDS = 3
PAIR_CHUNK = 1 << 16


@runtime_checkable
class Judge(Protocol):
    """A test part and how vectors fare on it.

    Attributes:
        metric: name of the score; higher is better.
        bounds: the lowest and the highest that it can be.
        items: numbers of the items that need vectors.
        targets: what the outputs are held against, one a unit.
    """

    metric: str
    bounds: tuple[float, float]
    items: Int[np.ndarray, "items"]
    targets: np.ndarray

    def outputs(self, vectors: Vectors) -> np.ndarray:
        """One row a unit."""

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        """The score of some units."""

    def figures(self, outputs: np.ndarray) -> dict[str, float]:
        """Further figures of all units, by name."""

    def bootstrap(self, outputs: Sequence[np.ndarray]) -> Bootstrap:
        """Resampled scores of several readouts, ``(seeds, units, ...)`` each."""


def judge_of(task: JudgedTask, judgement: Judgement, *, p_target: float = 0.01, index: Index = "auto") -> Judge:
    """The judge of a task.

    Args:
        task: which.
        judgement: of the fitting kind.
        p_target: prior of a same-source trial, for the minimum detection cost.
        index: how documents are searched.
    """
    if task == "verification" and isinstance(judgement, Pairs):
        return VerificationJudge(judgement, p_target)
    if task == "similarity" and isinstance(judgement, Pairs):
        return SimilarityJudge(judgement)
    if task == "retrieval" and isinstance(judgement, Relevance):
        return RetrievalJudge(judgement, index)
    if task == "clustering" and isinstance(judgement, Labels):
        return ClusteringJudge(judgement)
    raise ValueError(f"{task} cannot be judged by {type(judgement).__name__}")


def pair_cosines(vectors: Vectors, pairs: Pairs) -> Float[np.ndarray, "pairs"]:
    """Cosine of each pair. Not clamped at 0, as L-TDNN's code does, where all negative cosines tie."""
    unit = Vectors(F.normalize(vectors.table.double(), dim=1), vectors.place)
    found = []
    for start in range(0, len(pairs.first), PAIR_CHUNK):
        part = slice(start, start + PAIR_CHUNK)
        found.append((unit.of(pairs.first[part]) * unit.of(pairs.second[part])).sum(dim=1))
    return torch.cat(found).numpy()


def spearman(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Rank correlation; 0 where one side is constant, since it orders nothing."""
    return pearson(rankdata(a), rankdata(b))


def pearson(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Linear correlation; 0 where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


class VMeasure(NamedTuple):
    """Agreement of clusters with classes."""

    score: float
    homogeneity: float
    completeness: float


def v_measure(clusters: Int[np.ndarray, "items"], labels: Int[np.ndarray, "items"]) -> VMeasure:
    """Harmonic mean of homogeneity ``1 - H(class | cluster) / H(class)`` and completeness (the other way round).

    The same as scikit-learn's, a tenth of its time on the small samples of a bootstrap.
    """
    width = int(labels.max()) + 1
    joint = _entropy(np.bincount(clusters * width + labels))
    of_clusters, of_labels = _entropy(np.bincount(clusters)), _entropy(np.bincount(labels))
    shared = of_clusters + of_labels - joint
    homogeneity = shared / of_labels if of_labels > 0 else 1.0
    completeness = shared / of_clusters if of_clusters > 0 else 1.0
    total = homogeneity + completeness
    return VMeasure(2 * homogeneity * completeness / total if total > 0 else 0.0, homogeneity, completeness)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


class _Resampled:
    """Bootstrap of a score that is no mean over units."""

    bounds = (0.0, 1.0)
    targets: np.ndarray

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        raise NotImplementedError

    def bootstrap(self, outputs: Sequence[np.ndarray]) -> Bootstrap:
        work = sum(len(array) for array in outputs) * len(self.targets)
        return bootstrap_metric(self.score, outputs, self.targets, resamples=int(np.clip(5e7 / work, 200, 1000)))


class SimilarityJudge(_Resampled):
    """Spearman's correlation of the cosine with the judged degree; Pearson's beside it."""

    metric = "Spearman correlation"
    bounds = (-1.0, 1.0)

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.targets = pairs, pairs.value
        self.items = np.unique(np.concatenate([pairs.first, pairs.second]))

    def outputs(self, vectors: Vectors) -> np.ndarray:
        return pair_cosines(vectors, self.pairs)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        return spearman(outputs, targets)

    def figures(self, outputs: np.ndarray) -> dict[str, float]:
        return {"pearson": pearson(outputs, self.targets)}


class VerificationJudge(_Resampled):
    """1 - equal error rate; minimum detection cost at its operating point beside it."""

    metric = "1 - equal error rate"

    def __init__(self, pairs: Pairs, p_target: float) -> None:
        if not 0 < p_target < 1:
            raise ValueError(f"p_target must lie between 0 and 1, got {p_target}")
        self.pairs, self.targets, self.p_target = pairs, pairs.value, p_target
        self.items = np.unique(np.concatenate([pairs.first, pairs.second]))

    def outputs(self, vectors: Vectors) -> np.ndarray:
        return pair_cosines(vectors, self.pairs)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        same = targets > 0.5
        # A resample without one of the kinds says nothing.
        return 1 - equal_error_rate(outputs, same) if 0 < same.sum() < len(same) else 0.5

    def figures(self, outputs: np.ndarray) -> dict[str, float]:
        same = self.targets > 0.5
        cost = min_detection_cost(outputs, same, self.p_target)
        return {
            "eer": equal_error_rate(outputs, same), "min_dcf": cost.cost, "p_target": self.p_target,
            "dcf_threshold": cost.threshold,
        }  # fmt: skip


class RetrievalJudge:
    """nDCG@10 over all documents; recall and reciprocal rank beside it."""

    metric = "nDCG@10"
    bounds = (0.0, 1.0)

    def __init__(self, relevance: Relevance, index: Index = "auto") -> None:
        self.relevance, self.index = relevance, index
        self.items = np.unique(np.concatenate([relevance.queries, relevance.documents]))
        self.targets = np.bincount(relevance.query, minlength=len(relevance.queries))

    def outputs(self, vectors: Vectors) -> np.ndarray:
        """Columns nDCG@10, recall@10, recall@100, MRR@10 of each query."""
        r, queries = self.relevance, len(self.relevance.queries)
        found = rank_judged(
            vectors.of(r.queries), vectors.of(r.documents), r.query, r.document, index=self.index, excluded=r.excluded
        )
        columns = (
            ndcg(found, r.query, r.grade, queries, 10), recall(found, r.query, queries, 10),
            recall(found, r.query, queries, 100), reciprocal_rank(found, r.query, queries, 10),
        )  # fmt: skip
        return np.stack(columns, axis=1)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        return float(outputs[:, 0].mean())

    def figures(self, outputs: np.ndarray) -> dict[str, float]:
        return dict(zip(("recall@10", "recall@100", "mrr@10"), outputs[:, 1:].mean(axis=0).tolist(), strict=True))

    def bootstrap(self, outputs: Sequence[np.ndarray]) -> Bootstrap:
        return bootstrap_means([array[..., 0] for array in outputs])


class ClusteringJudge(_Resampled):
    """V-measure of k-means clusters of unit vectors, as many as classes, mean over ``starts``.

    The bootstrap keeps the clusters and resamples the items, so it holds the chance of the items and not that of
    another clustering.
    """

    metric = "V-measure"

    def __init__(self, labels: Labels, starts: int = CLUSTER_SEEDS) -> None:
        self.starts = starts
        self.items, present = labels.items, np.unique(labels.label, return_inverse=True)
        self.clusters, self.targets = len(present[0]), present[1]
        if self.clusters < 2:
            raise ValueError(f"clustering needs items of at least two classes, got {self.clusters}")

    def outputs(self, vectors: Vectors) -> np.ndarray:
        """The cluster of each item, a column a start."""
        from sklearn.cluster import KMeans

        unit = F.normalize(vectors.of(self.items), dim=1).numpy()
        starts = [
            KMeans(self.clusters, n_init=1, random_state=seed).fit_predict(unit).astype(np.int64)
            for seed in range(self.starts)
        ]
        return np.stack(starts, axis=1)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> float:
        return float(np.mean([v_measure(column, targets).score for column in outputs.T]))

    def figures(self, outputs: np.ndarray) -> dict[str, float]:
        found = np.mean([v_measure(column, self.targets)[1:] for column in outputs.T], axis=0)
        return {"homogeneity": float(found[0]), "completeness": float(found[1]), "clusters": float(self.clusters)}
