"""Nearest neighbours by cosine: exact in blocks, or through FAISS above a size.

Which index, by number of documents n of width d:

* ``exact``: matrix products a block of queries and documents at a time; no memory beyond the vectors. The default up to
  :data:`FAISS_FROM` documents, and wherever FAISS is not installed.
* ``flat``: FAISS's exhaustive index, the same results, its own threads and kernels; the default above.
* ``ivf``: about 4 sqrt(n) cells found by k-means, a sixteenth of them (at least 8) searched. Worth it from a million
  documents that form clusters, and for the first few neighbours. Vectors without structure it serves badly: among the
  1000 nearest of 3000 such vectors it found 13 % of the judged documents where exact search found 33 %.
* ``hnsw``: a graph of 32 neighbours a document, 128 candidates a search. The fastest search and the slowest to build,
  with about ``4 d + 270`` bytes a document; for a corpus that is searched many times.

The last two are approximate, so they are never chosen unasked: a difference between readouts should not be one of their
indices.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.ops.retrieval import Places, places

Index = Literal["auto", "exact", "flat", "ivf", "hnsw"]
INDICES = ("auto", "exact", "flat", "ivf", "hnsw")
FAISS_FROM = 100_000
"""Documents above which FAISS searches, and only the first :data:`DEPTH` of each query's documents are ranked."""
DEPTH = 1000
BLOCK = 1 << 24
"""Scores held at a time."""
BELOW = -2.0
"""Lower than any cosine."""


class Neighbours(NamedTuple):
    """The nearest documents of each query, best first.

    Attributes:
        scores: cosines, ``(queries, k)``; -inf where an approximate index found fewer than ``k``.
        documents: their numbers, ``(queries, k)``; -1 likewise.
    """

    scores: Float[Tensor, "queries k"]
    documents: Int[Tensor, "queries k"]


def search(
    queries: Float[Tensor, "queries dim"], documents: Float[Tensor, "documents width"], k: int, *, index: Index = "auto"
) -> Neighbours:
    """The ``k`` documents of largest cosine for each query (all of them where there are fewer).

    Of documents with exactly the same score, those of the smaller number come first in the exact search.

    Raises:
        ValueError: no documents, widths that differ, ``k`` below 1, an unknown index.
        ImportError: an index of FAISS is asked for and FAISS is not installed.
    """
    if index not in INDICES:
        raise ValueError(f"index must be one of {', '.join(INDICES)}, got {index!r}")
    if k < 1 or not len(documents) or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"expected k >= 1 and documents as wide as queries, got k={k}, {tuple(queries.shape)} and "
            f"{tuple(documents.shape)}"
        )
    queries, documents = (F.normalize(x.float(), dim=1) for x in (queries, documents))
    k = min(k, len(documents))
    kind = chosen_index(len(documents)) if index == "auto" else index
    return _exact(queries, documents, k) if kind == "exact" else _faiss(queries, documents, k, kind)


def chosen_index(documents: int) -> str:
    """What ``"auto"`` means for so many documents."""
    return "flat" if documents > FAISS_FROM and find_spec("faiss") is not None else "exact"


def rank_judged(
    queries: Float[Tensor, "queries dim"], documents: Float[Tensor, "documents dim"],
    query: Int[np.ndarray, "judgements"], document: Int[np.ndarray, "judgements"], *, index: Index = "auto",
    excluded: Int[np.ndarray, "excluded 2"] | None = None,
) -> Places:  # fmt: skip
    """Where the judged documents stand among all, by cosine.

    A document ``excluded`` for a query (rows of their positions) stands behind all others, and is not found where it
    is judged itself.

    Up to :data:`FAISS_FROM` documents (and under ``index="exact"``) from every score, so that ties are exact; beyond,
    within the first :data:`DEPTH` neighbours that :func:`search` finds.
    """
    excluded = np.empty((0, 2), dtype=int) if excluded is None else excluded
    if index == "exact" or (index == "auto" and len(documents) <= FAISS_FROM):
        unit = F.normalize(queries.float(), dim=1), F.normalize(documents.float(), dim=1)
        return _places_of_all(*unit, query, document, excluded)
    scores, numbers = (part.numpy() for part in search(queries, documents, DEPTH, index=index))
    for row, number in excluded:
        out = numbers[row] == number
        scores[row, out], numbers[row, out] = -np.inf, -1
    hit = numbers[query] == document[:, None]
    column = hit.argmax(axis=1)
    rows = scores[query]
    own = rows[np.arange(len(query)), column][:, None]
    tied = np.where(hit.any(axis=1), (rows == own).sum(axis=1), 0)
    return Places((rows > own).sum(axis=1), tied)


def _places_of_all(
    queries: Tensor, documents: Tensor, query: np.ndarray, document: np.ndarray, excluded: np.ndarray
) -> Places:
    above, tied = np.zeros(len(query), dtype=np.int64), np.zeros(len(query), dtype=np.int64)
    step = max(1, BLOCK // len(documents))
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        rows = np.flatnonzero((query >= start) & (query < stop))
        scores = (queries[start:stop] @ documents.T).numpy()
        own = excluded[(excluded[:, 0] >= start) & (excluded[:, 0] < stop)]
        scores[own[:, 0] - start, own[:, 1]] = BELOW
        above[rows], tied[rows] = places(scores, query[rows] - start, document[rows])
    wide = np.int64(len(documents))
    tied[np.isin(query * wide + document, excluded[:, 0] * wide + excluded[:, 1])] = 0
    return Places(above, tied)


def _exact(queries: Tensor, documents: Tensor, k: int) -> Neighbours:
    """A block of queries against a block of documents at a time, keeping the best ``k`` so far."""
    wide = min(len(documents), max(k, 1 << 16))
    step = max(1, BLOCK // wide)
    found = []
    for some in queries.split(step):
        scores = torch.empty(len(some), 0)
        numbers = torch.empty(len(some), 0, dtype=torch.int64)
        for start in range(0, len(documents), wide):
            block = some @ documents[start : start + wide].T
            scores = torch.cat([scores, block], dim=1)
            numbers = torch.cat([numbers, torch.arange(start, start + block.shape[1]).expand(len(some), -1)], dim=1)
            # Stable, so that equal scores stay in the order of their numbers; topk makes no such promise.
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
            scores, numbers = scores.gather(1, order), numbers.gather(1, order)
        found.append((scores, numbers))
    return Neighbours(torch.cat([s for s, _ in found]), torch.cat([n for _, n in found]))


def _faiss(queries: Tensor, documents: Tensor, k: int, kind: str) -> Neighbours:
    try:
        import faiss
    except ImportError:
        raise ImportError(f"index={kind!r} needs FAISS: pip install 'cenote[retrieval]'") from None
    width, count = documents.shape[1], len(documents)
    vectors = np.ascontiguousarray(documents.numpy())
    built: Any = faiss.IndexFlatIP(width)
    if kind == "ivf":
        cells = max(1, min(round(4 * math.sqrt(count)), count // 39 or 1))  # 39: what FAISS wants to learn a cell from
        built = faiss.IndexIVFFlat(built, width, cells, faiss.METRIC_INNER_PRODUCT)
        built.cp.seed = 0
        built.train(vectors)
        built.nprobe = min(cells, max(8, cells // 16))
    elif kind == "hnsw":
        built = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        built.hnsw.efConstruction, built.hnsw.efSearch = 200, max(128, k)
    built.add(vectors)
    scores, numbers = built.search(np.ascontiguousarray(queries.numpy()), k)
    missing = torch.from_numpy(numbers < 0)
    return Neighbours(torch.from_numpy(scores).masked_fill(missing, -torch.inf), torch.from_numpy(numbers))
