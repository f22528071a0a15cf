"""Data whose vectors are judged by each other: pairs, queries with relevant documents, clusters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from cenote.data.base import Items, Skipped
from cenote.types import JudgedTask, Modality


@dataclass(frozen=True)
class Pairs:
    """Pairs of items with a judgement each.

    Attributes:
        first, second: item numbers, ``(pairs,)``.
        value: 1 for the same and 0 for another speaker (verification), or a degree of similarity.
    """

    first: Int[np.ndarray, "pairs"]
    second: Int[np.ndarray, "pairs"]
    value: Float[np.ndarray, "pairs"]


@dataclass(frozen=True)
class Relevance:
    """Queries, the documents that are searched, and which of these are relevant.

    Attributes:
        queries: item numbers, ``(queries,)``.
        documents: item numbers, ``(documents,)``.
        query, document: positions in ``queries`` and ``documents`` of each judged pair, ``(judgements,)``.
        grade: how relevant, above 0, ``(judgements,)``; pairs that are not listed count as 0.
        excluded: positions of a query and a document that is not searched for it, ``(excluded, 2)``: the query itself
            where it is also among the documents.
    """

    queries: Int[np.ndarray, "queries"]
    documents: Int[np.ndarray, "documents"]
    query: Int[np.ndarray, "judgements"]
    document: Int[np.ndarray, "judgements"]
    grade: Float[np.ndarray, "judgements"]
    excluded: Int[np.ndarray, "excluded 2"] = field(default_factory=lambda: np.empty((0, 2), dtype=int))

    def with_documents(self, kept: Int[np.ndarray, "kept"]) -> Relevance:
        """Of some documents, by ascending position; all that are judged must be among them."""
        rows = np.isin(self.excluded[:, 1], kept)
        excluded = np.stack([self.excluded[rows, 0], np.searchsorted(kept, self.excluded[rows, 1])], axis=1)
        return replace(
            self, documents=self.documents[kept], document=np.searchsorted(kept, self.document), excluded=excluded
        )

    def with_queries(self, kept: Bool[np.ndarray, "queries"]) -> Relevance:
        """Of some queries."""
        rows, outside, number = kept[self.query], kept[self.excluded[:, 0]], np.cumsum(kept) - 1
        excluded = np.stack([number[self.excluded[outside, 0]], self.excluded[outside, 1]], axis=1)
        return Relevance(
            self.queries[kept], self.documents, number[self.query[rows]], self.document[rows], self.grade[rows],
            excluded,
        )  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """Items with a class each: what clusters are held against, and what a readout may be trained on.

    Attributes:
        items: item numbers, ``(labelled,)``.
        label: class numbers from 0, ``(labelled,)``.
        names: of the classes.
    """

    items: Int[np.ndarray, "labelled"]
    label: Int[np.ndarray, "labelled"]
    names: tuple[str, ...]


Judgement = Pairs | Relevance | Labels


@dataclass(frozen=True)
class JudgedData:
    """Every item once, and judgements that refer to items by number.

    What is trained on is pairs (similarity), relevance (retrieval) or labels (verification, clustering). The feature
    store takes it as it takes one part of labelled data, since it has items, ids, a fingerprint and a length.

    Attributes:
        name: what it was loaded from.
        modality: ``"image"``, ``"text"``, ``"audio"`` or ``"graph"``.
        task: what is judged.
        items: raw items, decoded on access.
        ids: a name an item.
        fingerprint: digest of the items.
        train: what readouts are trained on; ``None`` where there is nothing, so that only readouts without parameters
            (and untrained ones, said to be so) can be compared.
        validation: what settings are chosen on, or ``None``. Where readouts are trained on labels: more items of the
            same classes, whose labels are predicted; or judgements of the test part's kind on items of other classes.
        test: what is reported.
        skipped: items left out under ``on_error="skip"``.
        notes: what else a reader must know of how the parts were made.
    """

    name: str
    modality: Modality
    task: JudgedTask
    items: Items
    ids: tuple[str, ...]
    fingerprint: str
    train: Judgement | None
    validation: Judgement | None
    test: Judgement
    skipped: tuple[Skipped, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    @property
    def chosen_by_labels(self) -> bool:
        """Whether settings are chosen by predicting the labels of the validation part, and not by the task itself."""
        return (
            isinstance(self.train, Labels)
            and isinstance(self.validation, Labels)
            and self.validation.names == self.train.names
        )

    def __len__(self) -> int:
        return len(self.items)
