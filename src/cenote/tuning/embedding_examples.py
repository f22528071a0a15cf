"""From judgements to contrastive examples: which items belong together, and which may be told apart."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.data.judged import Judgement, Labels, Pairs
from cenote.tuning.contrastive import select_hard_negatives


class Negatives(NamedTuple):
    """Documents that are wrong for each row's query.

    Attributes:
        items: item numbers, ``(rows, negatives)``.
        valid: ``False`` where there was none to put.
    """

    items: Int[np.ndarray, "rows negatives"]
    valid: Bool[np.ndarray, "rows negatives"]


@runtime_checkable
class Examples(Protocol):
    """Rows of a query and a positive document, by item number.

    Attributes:
        mined: whether hard negatives are worth looking for; where rows of one class are positives of each other, any
            item of another class is as wrong as the next.
        candidates: items that may be hard negatives, ``(candidates,)``.
    """

    mined: bool
    candidates: np.ndarray

    def __len__(self) -> int: ...

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Query and positive of the named rows."""

    def negatives(self, queries: np.ndarray, count: int, rng: np.random.Generator) -> Negatives:
        """Random documents that are not related to the queries."""

    def related(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Whether a document must not count as wrong for a query; shapes broadcast."""

    def related_to(self, query: int) -> np.ndarray:
        """All items that must not count as wrong for one query."""


class ListedExamples:
    """Rows given one by one, from pairs or from relevance.

    Args:
        queries, positives: the rows, ``(rows,)``.
        related: pairs of items of which neither may be a negative of the other's query, two of ``(pairs,)``.
        candidates: items that may be negatives.
    """

    mined = True

    def __init__(
        self,
        queries: Int[np.ndarray, "rows"],
        positives: Int[np.ndarray, "rows"],
        related: tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]],
        candidates: Int[np.ndarray, "candidates"],
    ) -> None:
        self.queries, self.positives, self.candidates = queries, positives, np.unique(candidates)
        self._span = 1 + int(max(x.max(initial=0) for x in (queries, positives, candidates, *related)))
        self._keys = np.unique(related[0].astype(np.int64) * self._span + related[1])

    def __len__(self) -> int:
        return len(self.queries)

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.queries[rows], self.positives[rows]

    def negatives(self, queries: np.ndarray, count: int, rng: np.random.Generator) -> Negatives:
        # More than needed, since some will be related; those go to the end.
        drawn = rng.choice(self.candidates, (len(queries), 4 * count))
        wrong = self.related(queries[:, None], drawn)
        best = np.argsort(wrong, axis=1, kind="stable")[:, :count]
        return Negatives(np.take_along_axis(drawn, best, 1), ~np.take_along_axis(wrong, best, 1))

    def related(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        keys = queries.astype(np.int64) * self._span + documents
        return np.isin(keys, self._keys) | (queries == documents)

    def related_to(self, query: int) -> np.ndarray:
        low, high = np.searchsorted(self._keys, [query * self._span, (query + 1) * self._span])
        return np.append(self._keys[low:high] - query * self._span, query)


class LabelExamples:
    """Every item with a random other item of its class; items of other classes are wrong.

    Items whose class has no second item serve as negatives only.
    """

    mined = False

    def __init__(self, labels: Labels) -> None:
        order = np.argsort(labels.label, kind="stable")
        self.candidates = np.asarray(labels.items)[order]
        classes, self._class = np.unique(np.asarray(labels.label)[order], return_inverse=True)
        self._count = np.bincount(self._class, minlength=len(classes))
        self._start = np.cumsum(self._count) - self._count
        self._rows = np.flatnonzero(self._count[self._class] > 1)
        self._place = np.full(int(self.candidates.max(initial=0)) + 1, -1)
        self._place[self.candidates] = np.arange(len(self.candidates))

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        place = self._rows[rows]
        start, count = self._start[self._class[place]], self._count[self._class[place]]
        other = start + (place - start + rng.integers(1, count)) % count
        return self.candidates[place], self.candidates[other]

    def negatives(self, queries: np.ndarray, count: int, rng: np.random.Generator) -> Negatives:
        own = self._class[self._place[queries]][:, None]
        start, size = self._start[own], self._count[own]
        outside = len(self.candidates) - size
        drawn = rng.integers(0, np.maximum(outside, 1), (len(queries), count))
        drawn = np.where(drawn < start, drawn, drawn + size) % len(self.candidates)
        return Negatives(self.candidates[drawn], np.broadcast_to(outside > 0, drawn.shape))

    def related(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        return self._class[self._place[queries]] == self._class[self._place[documents]]

    def related_to(self, query: int) -> np.ndarray:
        return self.candidates[self._class == self._class[self._place[query]]]


def examples_of(judgement: Judgement, similar: float, dissimilar: float) -> Examples:
    """Contrastive examples as NV-Embed makes them.

    Pairs judged at ``similar`` times the largest value or above give two examples, one in each direction; pairs above
    ``dissimilar`` times it are never negatives of each other. A query with a relevant document is an example, once for
    each such document; a document that is not searched for a query is none of its negatives. An item of a class is an
    example with a random other one of the class.

    Raises:
        ValueError: nothing that could be a positive.
    """
    if isinstance(judgement, Labels):
        examples: Examples = LabelExamples(judgement)
        missing = "two items of one class"
    elif isinstance(judgement, Pairs):
        top = float(np.max(judgement.value, initial=0))
        alike, close = judgement.value >= similar * top, judgement.value > dissimilar * top
        a, b = judgement.first[alike], judgement.second[alike]
        near = judgement.first[close | alike], judgement.second[close | alike]
        if top <= 0:
            a = b = a[:0]
        examples = ListedExamples(
            np.concatenate([a, b]), np.concatenate([b, a]),
            (np.concatenate(near), np.concatenate(near[::-1])),
            np.concatenate([judgement.first, judgement.second]),
        )  # fmt: skip
        missing = f"a pair judged {similar} of the largest value or above"
    else:
        query, document = judgement.queries[judgement.query], judgement.documents[judgement.document]
        own, out = judgement.queries[judgement.excluded[:, 0]], judgement.documents[judgement.excluded[:, 1]]
        near = np.concatenate([query, own]), np.concatenate([document, out])
        examples = ListedExamples(query, document, near, judgement.documents)
        missing = "a query with a relevant document"
    if not len(examples):
        raise ValueError(f"contrastive training needs {missing}, and there is none among {type(judgement).__name__}")
    return examples


def mine(
    examples: Examples,
    items: Int[np.ndarray, "items"],
    vectors: Float[Tensor, "items dim"],
    *,
    top_k: int,
    margin: float,
    chunk: int = 256,
) -> Negatives:
    """Hard negatives of every row: the unrelated candidates most similar to the query by the vectors themselves, below
    ``margin`` of the positive's similarity (:func:`cenote.tuning.contrastive.select_hard_negatives`).

    Args:
        examples: the rows.
        items: numbers of the items that have vectors, ascending; candidates without one are left out.
        vectors: their vectors.
        top_k: negatives a row.
        margin: fraction of the positive's cosine.
        chunk: rows scored at a time.
    """
    units = F.normalize(vectors.float(), dim=-1)
    documents = np.intersect1d(examples.candidates, items)
    candidates = units[torch.from_numpy(np.searchsorted(items, documents)).to(units.device)]
    queries, positives = examples.draw(np.arange(len(examples)), np.random.default_rng(0))
    kept = min(top_k, len(documents))
    chosen = np.zeros((len(queries), top_k), dtype=np.int64)
    valid = np.zeros((len(queries), top_k), dtype=bool)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        q, p = (units[torch.from_numpy(np.searchsorted(items, x[rows])).to(units.device)] for x in (queries, positives))
        scores = q @ candidates.T
        for row, query in enumerate(queries[rows]):
            related = np.intersect1d(examples.related_to(int(query)), documents)
            scores[row, torch.from_numpy(np.searchsorted(documents, related)).to(scores.device)] = float("-inf")
        best = select_hard_negatives(scores, (q * p).sum(dim=1), top_k=kept, margin=margin)
        chosen[rows, :kept] = documents[best.chosen.cpu().numpy()]
        valid[rows, :kept] = best.valid.cpu().numpy()
    return Negatives(chosen, valid)
