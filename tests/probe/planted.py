"""A backbone for judged tasks whose items carry a class on one flagged token among noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from cenote.backbones.base import Backbone
from cenote.data.judged import JudgedData, Labels, Pairs, Relevance
from cenote.types import Features

DIM, TOKENS = 16, 6


class PlantedBackbone(Backbone):
    """Text items ``"<class> <number>"``: the direction of the class and a flag on one token, noise on the others.

    Rows have 4 to 6 tokens, so that masks matter; hidden state 1 is noise throughout, the last one is as above.
    """

    spec, modality, dim, num_layers, pooled_dim = "planted", "text", DIM, 2, DIM

    def __init__(self, signal: float = 3.0, noise: float = 1.0) -> None:
        self.signal, self.noise, self.calls = signal, noise, 0
        self.module = torch.nn.Identity()

    def collate(self, items: Sequence[str]) -> dict:
        return {"items": torch.tensor([[int(part) for part in item.split()[-2:]] for item in items])}

    def encode(self, batch, layers, reduce):
        self.calls += 1
        hidden, masks = [], []
        for kind, number in batch["items"].tolist():
            generator = torch.Generator().manual_seed(1000 * kind + number)
            rows = self.noise * torch.randn(3, TOKENS, DIM, generator=generator)
            count = 4 + number % 3
            direction = torch.randn(DIM, generator=torch.Generator().manual_seed(kind))
            direction[0] = 0
            place = int(torch.randint(count, (1,), generator=generator))
            rows[2, :, 0] = 0
            rows[2, place] = self.signal * direction / direction.norm() + 0.3 * rows[2, place]
            rows[2, place, 0] = self.signal
            hidden.append(rows[list(layers)])
            masks.append(torch.arange(TOKENS) < count)
        stacked = torch.stack(hidden)
        return Features(stacked, torch.stack(masks), tuple(layers), pooled=stacked[:, -1].mean(dim=1))

    def transform_id(self) -> str:
        return "identity"

    def fingerprint(self) -> str:
        return f"{self.signal} {self.noise}"

    def token_strings(self, item: str) -> list[str]:
        return [str(i) for i in range(4 + int(item.split()[-1]) % 3)]


def named(pairs: Sequence[tuple[int, int]]) -> tuple[list[str], tuple[str, ...]]:
    items = [f"{kind} {number}" for kind, number in pairs]
    return items, tuple(f"item {item}" for item in items)


def labelled(task: str, classes: int = 6, train: int = 20, test: int = 8, trained: bool = True) -> JudgedData:
    """Training and test items of different classes for verification, of the same for clustering."""
    fresh = classes if task == "verification" else 0
    numbers = [(kind, n) for kind in range(classes) for n in range(train)]
    start = len(numbers)
    numbers += [(fresh + kind, 500 + n) for kind in range(classes) for n in range(test)]
    kinds = np.array([kind for kind, _ in numbers])
    items, ids = named(numbers)
    place = np.arange(start)
    held = place % 5 == 0
    names = tuple(f"c{i}" for i in range(classes))
    parts = [Labels(place[rows], kinds[:start][rows], names) for rows in (~held, held)] if trained else [None, None]
    tested = np.arange(start, len(numbers))
    if task == "verification":
        rows, columns = np.triu_indices(len(tested), 1)
        first, second = tested[rows], tested[columns]
        judged = Pairs(first, second, (kinds[first] == kinds[second]).astype(float))
    else:
        judged = Labels(tested, kinds[start:] - fresh, names)
    return JudgedData("planted", "text", task, items, ids, f"{task} {classes} {train} {test}", *parts, judged)


def with_other_classes(data: JudgedData, classes: int = 5, size: int = 12) -> JudgedData:
    """The same data with a validation part of classes that are neither trained on nor tested."""
    numbers = [(300 + kind, n) for kind in range(classes) for n in range(size)]
    items, ids = named(numbers)
    start = len(data)
    place, kinds = start + np.arange(len(items)), np.repeat(np.arange(classes), size)
    validation: Labels | Pairs = Labels(place, kinds, tuple(f"v{i}" for i in range(classes)))
    if data.task == "verification":
        rows, columns = np.triu_indices(len(items), 1)
        validation = Pairs(place[rows], place[columns], (kinds[rows] == kinds[columns]).astype(float))
    return replace(
        data, items=[*data.items, *items], ids=(*data.ids, *ids), validation=validation,
        fingerprint=f"{data.fingerprint} and others",
    )  # fmt: skip


def pairs_data(count: int = 150, classes: int = 5, parts: tuple[float, float] = (0.5, 0.7)) -> JudgedData:
    """Pairs whose degree is 5 within a class, and 0 to 2 between two."""
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, classes, (count, 2))
    kinds[::2, 1] = kinds[::2, 0]
    numbers = [(int(kind), n) for n, kind in enumerate(kinds.ravel())]
    items, ids = named(numbers)
    first, second = np.arange(0, 2 * count, 2), np.arange(1, 2 * count, 2)
    value = np.where(kinds[:, 0] == kinds[:, 1], 5.0, generator.random(count) * 2)
    cuts = [0, int(parts[0] * count), int(parts[1] * count), count]
    train, validation, test = (Pairs(first[a:b], second[a:b], value[a:b]) for a, b in pairwise(cuts))
    return JudgedData("planted", "text", "similarity", items, ids, f"pairs {count}", train, validation, test)


def relevance_data(queries: int = 60, documents: int = 80, classes: int = 10, trained: bool = True) -> JudgedData:
    """Queries whose relevant documents are those of their class."""
    numbers = [(n % classes, n) for n in range(queries)] + [(n % classes, 5000 + n) for n in range(documents)]
    items, ids = named(numbers)

    def part(chosen: np.ndarray) -> Relevance:
        judged = [(i, d) for i, q in enumerate(chosen) for d in range(documents) if d % classes == q % classes]
        query, document = np.array(judged).T
        return Relevance(chosen, queries + np.arange(documents), query, document, np.ones(len(judged)))

    places = np.array_split(np.arange(queries), 3)
    parts = [part(places[0]), part(places[1])] if trained else [None, None]
    return JudgedData("planted", "text", "retrieval", items, ids, f"retrieval {queries}", *parts, part(places[2]))
