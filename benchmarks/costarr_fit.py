"""COSTARR through one mean a class against the rule as it reads, and against a search for neighbours.

Fit and score together, on generated features of a wide classifier. The plain form joins each feature with its
product with the class weights, keeps templates of twice the width and takes plain cosines; the shortcut takes the
cosine in the metric 1 + W^2. KNN compares every test item with every training item.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from common import finish, interleaved, ratio
from torch import Tensor

from cenote.inspection import CoStarr
from cenote.inspection.open_set_neighbours import KNN


def plain(weight: Tensor, bias: Tensor, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Both halves side by side."""
    logits = train @ weight.T + bias
    kept = logits.argmax(dim=1) == labels
    joined = torch.cat([train, weight[labels] * train], dim=1)[kept]
    sums = torch.zeros(len(weight), joined.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels[kept], joined.double())
    templates = (sums / labels[kept].bincount(minlength=len(weight))[:, None]).float()
    top, predicted = (test @ weight.T + bias).max(dim=1)
    joined = torch.cat([test, weight[predicted] * test], dim=1)
    similarity = (1 + torch.cosine_similarity(joined, templates[predicted])) / 2
    return (top - logits.min()) / (logits.max() - logits.min()) * similarity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--items", type=int, default=20000, help="training items")
    parser.add_argument("--repeats", type=int, default=7)
    options, _ = parser.parse_known_args()
    rows, against_plain = [], []
    for classes, dim in ((100, 384), (100, 1024), (1000, 768)):
        g = torch.Generator().manual_seed(0)
        weight, bias = 0.5 * torch.randn(classes, dim, generator=g), torch.zeros(classes)
        labels = torch.arange(options.items) % classes
        train = torch.randn(options.items, dim, generator=g) + weight[labels]
        test = torch.randn(2000, dim, generator=g) + weight[torch.arange(2000) % classes]
        calls: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: plain(weight, bias, train, labels, test),  # noqa: B023
            "shortcut": lambda: CoStarr(weight, bias).fit(train, labels).score(test),  # noqa: B023
            "knn": lambda: KNN(weight, bias, k=min(50, options.items)).fit(train, labels).score(test),  # noqa: B023
        }
        torch.testing.assert_close(calls["shortcut"](), calls["plain"](), rtol=1e-4, atol=1e-5)
        times = interleaved(calls, repeats=options.repeats, warmup=1)
        against_plain.append(ratio(times, "plain", "shortcut"))
        rows.append(
            {
                "classes": classes,
                "dim": dim,
                "training items": options.items,
                **{f"{name} ms": 1e3 * statistics.median(values) for name, values in times.items()},
                "plain / shortcut": against_plain[-1],
                "knn / shortcut": ratio(times, "knn", "shortcut"),
                "stored by plain (floats)": 2 * classes * dim,
                "stored by shortcut": classes * dim,
                "stored by knn": options.items * dim,
            }
        )
    finish(
        "COSTARR: fit and score", "the concatenated form", 1, rows, statistics.geometric_mean(against_plain), __doc__
    )


if __name__ == "__main__":
    main()
