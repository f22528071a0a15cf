"""Data whose vectors are judged by each other: pairs, queries with relevant documents, clusters."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

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
    """

    queries: Int[np.ndarray, "queries"]
    documents: Int[np.ndarray, "documents"]
    query: Int[np.ndarray, "judgements"]
    document: Int[np.ndarray, "judgements"]
    grade: Float[np.ndarray, "judgements"]


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
        validation: what settings are chosen on, or ``None``.
        test: what is reported.
        skipped: items left out under ``on_error="skip"``.
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

    def __len__(self) -> int:
        return len(self.items)
