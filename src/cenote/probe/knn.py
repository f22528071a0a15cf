"""k-nearest-neighbour classification of frozen features, the baseline that trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Similarities of one chunk of test items: 16 Mi numbers, 64 MiB in float32.
_CHUNK_ENTRIES = 1 << 24


class KNNScore(NamedTuple):
    """Accuracy of one setting.

    Attributes:
        k: number of neighbours.
        temperature: T of the weights ``exp(cos / T)``.
        top1: fraction of test items whose best class is right.
        top5: fraction whose class is among the best five (among all, if there are fewer).
    """

    k: int
    temperature: float
    top1: float
    top5: float


def knn_scores(
    train: Float[Tensor, "train *tokens dim"],
    train_labels: Int[Tensor, "labels"],
    test: Float[Tensor, "test *its_tokens width"],
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Float[Tensor, "test classes"]:
    """Class scores of test items by their nearest training items.

    ``score_c = sum_{i in N_k, y_i = c} exp(cos_i / T) / sum_{i in N_k} exp(cos_i / T)``. Features are L2-normalised
    first; tokens (three axes) are averaged before. Test items are taken in chunks, so memory is bounded whatever
    their number.

    Args:
        train: features ``(train, dim)`` or tokens ``(train, tokens, dim)``.
        train_labels: classes, ``0 .. num_classes - 1``.
        test: features or tokens of the same width.
        k: number of neighbours.
        temperature: T, positive. The smaller, the more the nearest count.
        num_classes: number of classes; the largest training label + 1 unless given.

    Raises:
        TypeError: labels that are not integers.
        ValueError: k below 1 or above the number of training items, labels out of range, features that are not
            finite, shapes that do not fit.
    """
    classes = _check(train, train_labels, test, None, [k], [temperature], num_classes)
    chunks = _neighbours(_features(train, "train"), train_labels, _features(test, "test"), k)
    return torch.cat([_vote(cosine, labels, temperature, classes) for cosine, labels in chunks])


def knn_grid(
    train: Float[Tensor, "train *tokens dim"],
    train_labels: Int[Tensor, "labels"],
    test: Float[Tensor, "test *its_tokens width"],
    test_labels: Int[Tensor, "test_labels"],
    neighbours: Sequence[int] = (5, 10, 15, 20, 50, 100, 200),
    temperatures: Sequence[float] = (0.07, 0.1, 0.2),
    num_classes: int | None = None,
) -> list[KNNScore]:
    """Accuracy for every temperature (outer) and number of neighbours (inner); neighbours are searched once.

    Classes of equal score are ranked by their number, so with fewer than five classes among the neighbours a class
    without a vote can still count for top-5, as in the official evaluation of "Attention, Please!" (arXiv
    2506.10178). That one divides the test set into 500 chunks and fails below 500 items; any number works here.

    Args and errors as :func:`knn_scores`; ``test_labels`` must be in range too.
    """
    classes = _check(train, train_labels, test, test_labels, neighbours, temperatures, num_classes)
    settings = [(temperature, k) for temperature in temperatures for k in neighbours]
    hits = torch.zeros(len(settings), 2, dtype=torch.long)
    start = 0
    for cosine, labels in _neighbours(
        _features(train, "train"), train_labels, _features(test, "test"), max(neighbours)
    ):
        target = test_labels[start : start + len(labels), None].to(labels.device)
        start += len(labels)
        for row, (temperature, k) in enumerate(settings):
            scores = _vote(cosine[:, :k], labels[:, :k], temperature, classes)
            hit = scores.argsort(dim=1, descending=True, stable=True)[:, :5] == target
            hits[row] += torch.stack([hit[:, 0].sum(), hit.sum()]).cpu()
    rates = (hits.double() / len(test)).tolist()
    return [KNNScore(k, temperature, *rate) for (temperature, k), rate in zip(settings, rates, strict=True)]


def _neighbours(train: Tensor, labels: Tensor, test: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and labels of the k nearest training items, ``(chunk, k)`` each, nearest first, chunk by chunk."""
    for chunk in test.split(max(1, _CHUNK_ENTRIES // len(train))):
        cosine, index = (chunk @ train.T).topk(k, dim=1)
        yield cosine, labels.to(index.device)[index]


def _vote(cosine: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    weights = (cosine / temperature).softmax(dim=1)
    return weights.new_zeros(len(weights), classes).scatter_add(1, labels.long(), weights)


def _features(x: Tensor, what: str) -> Tensor:
    """Averaged over tokens, L2-normalised, in float32 or better."""
    x = x if x.dtype == torch.float64 else x.float()
    flat = x.mean(dim=1) if x.ndim == 3 else x
    finite = flat.isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"{what} features are not finite in item(s) {(~finite).nonzero().flatten().tolist()[:10]}")
    return torch.nn.functional.normalize(flat, dim=1)


def _check(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor | None,
    neighbours: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int | None,
) -> int:
    """Raise on unfit input, else the number of classes."""
    if train.ndim not in (2, 3) or test.ndim != train.ndim or test.shape[-1] != train.shape[-1]:
        raise ValueError(
            "features must be (items, dim) or (items, tokens, dim) of one width, "
            f"got {tuple(train.shape)} and {tuple(test.shape)}"
        )
    if not len(train) or not len(test):
        raise ValueError(f"k-NN needs training and test items, got {len(train)} and {len(test)}")
    if not neighbours or not temperatures:
        raise ValueError("k-NN needs at least one number of neighbours and one temperature")
    for k in neighbours:
        if not 1 <= k <= len(train):
            raise ValueError(f"k must lie between 1 and the number of training items {len(train)}, got {k}")
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"the temperature must be positive, got {temperature}")
    given = {"train": (train, train_labels)} | ({} if test_labels is None else {"test": (test, test_labels)})
    classes = num_classes
    for what, (features, labels) in given.items():
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"{what} labels must be integers, got {labels.dtype}")
        if labels.shape != (len(features),):
            raise ValueError(f"{what} labels must have shape ({len(features)},), got {tuple(labels.shape)}")
        classes = int(labels.max()) + 1 if classes is None else classes
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"{what} labels must lie in 0..{classes - 1}, got {low}..{high}")
    assert classes is not None
    return classes
