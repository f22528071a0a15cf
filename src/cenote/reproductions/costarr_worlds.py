"""Data with classes that training never sees, a small classifier, and what open-set scores make of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.data import load_data
from cenote.inspection import OPEN_SET_SCORES
from cenote.ops.open_set import auoscr, auroc, oscr_curve

KNOWN = 6
DIGITS_HIDDEN, FASHION_HIDDEN = (128, 64), (256, 64)


class World(NamedTuple):
    """Flat inputs and labels; unknown test items have the label -1."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Classifier(NamedTuple):
    """Features in front of the linear layer, and that layer."""

    train: Tensor
    test: Tensor
    head: nn.Linear


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "COSTARR": ("costarr", {}),
    "COSTARR, raw cosine": ("costarr", {"similarity": "cosine"}),
    "COSTARR, feature before attenuation alone": ("costarr", {"parts": "pre"}),
    "COSTARR, feature after attenuation alone": ("costarr", {"parts": "post"}),
    "MaxLogit": ("maxlogit", {}),
    "MSP": ("msp", {}),
    "Energy": ("energy", {}),
    "KNN": ("knn", {"k": 10}),
}


def digits_world(seed: int) -> World:
    """Six random classes of scikit-learn's digits known, four unknown; about 720 items to train on, 597 to test."""
    data = load_data("digits")
    parts = [(data.train, data.validation), (data.test,)]
    pixels, labels = [], []
    for splits in parts:
        images = [np.asarray(split.items[i]) for split in splits for i in range(len(split))]
        pixels.append(torch.from_numpy(np.stack(images)).float().flatten(1) / 255)
        labels.append(torch.cat([split.targets for split in splits]))
    return hold_out(pixels[0], labels[0], pixels[1], labels[1], seed)


def fashion_world(path: Path, seed: int) -> World:
    """Six random classes of Fashion-MNIST known, four unknown; 7200 items to train on, 4000 to test."""
    with np.load(path, allow_pickle=False) as archive:
        pixels = [torch.from_numpy(archive[name]).float().flatten(1) / 255 for name in ("train_x", "test_x")]
        labels = [torch.from_numpy(archive[name]).long() for name in ("train_y", "test_y")]
    return hold_out(pixels[0], labels[0], pixels[1], labels[1], seed)


def hold_out(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, seed: int) -> World:
    """Six random classes of ten numbered anew; the others leave training and become -1 in the test."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    number = torch.full((10,), -1)
    number[order[:KNOWN]] = torch.arange(KNOWN)
    kept = number[train_labels] >= 0
    return World(train[kept], number[train_labels[kept]], test, number[test_labels])


def train_classifier(
    world: World, seed: int, hidden: tuple[int, ...] = DIGITS_HIDDEN, epochs: int = 60, batch: int = 64
) -> Classifier:
    """A multilayer perceptron with rectifiers: Adam at 1e-3, no decay; ordinary settings, not tuned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (world.train.shape[1], *hidden)
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        body, head = nn.Sequential(*layers), nn.Linear(sizes[-1], KNOWN)
        optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(world.train)).split(batch):
                loss = F.cross_entropy(head(body(world.train[index])), world.train_labels[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    with torch.no_grad():
        return Classifier(body(world.train), body(world.test), head.requires_grad_(False))


class Measures(NamedTuple):
    """In per cent."""

    auroc: float
    auoscr: float


def measure(
    world: World, model: Classifier, methods: Mapping[str, tuple[str, dict[str, Any]]] = METHODS
) -> dict[str, Measures]:
    """AUROC and AUOSCR of every method on the test items."""
    predictions = model.head(model.test).argmax(dim=1)
    found = {}
    for title, (name, options) in methods.items():
        score = OPEN_SET_SCORES[name].from_head(model.head, **options).fit(model.train, world.train_labels)
        values = score.score(model.test)
        area = auoscr(oscr_curve(values, predictions, world.test_labels))
        found[title] = Measures(100 * auroc(values, world.test_labels), 100 * area)
    return found


def planted_attenuation(seed: int, items: int = 1000) -> tuple[World, Classifier]:
    """Unknowns that differ from knowns only where the class weights are near zero.

    Four classes over 24 non-negative features. The first 12 tell the classes apart: each class has three that are
    about 2 instead of 0.5, and its weights are 2 there and -1 elsewhere in the first 12. The last 12 have weights of
    1e-3 at most. In knowns the first half of these is about 2 and the second about 0.5; in unknowns the halves are
    exchanged. Unknowns carry the features of a class in the first 12 like everyone else.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.full((4, 12), -1.0)
    for k in range(4):
        weight[k, 3 * k : 3 * k + 3] = 2.0
    weight = torch.cat([weight, 1e-3 * torch.randn(4, 12, generator=g).clamp(-1, 1)], dim=1)

    def draw(count: int, unknown: bool) -> tuple[Tensor, Tensor]:
        labels = torch.randint(4, (count,), generator=g)
        level = torch.full((count, 24), 0.5)
        level[:, :12][weight[labels, :12] > 0] = 2.0
        first = 18 if unknown else 12
        level[:, first : first + 6] = 2.0
        return (level + 0.3 * torch.randn(count, 24, generator=g)).clamp_min(0), labels

    train, labels = draw(items, unknown=False)
    known, own = draw(items, unknown=False)
    strange, _ = draw(items, unknown=True)
    world = World(train, labels, torch.cat([known, strange]), torch.cat([own, torch.full((items,), -1)]))
    head = nn.Linear(24, 4, bias=False).requires_grad_(False)
    head.weight.copy_(weight)
    return world, Classifier(world.train, world.test, head)
