"""Open-set scores by training items close by: KNN and NNGuide. Both keep a bank, so memory grows with the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.inspection.open_set_base import OpenSetScore
from cenote.ops.open_set import unit

ENTRIES = 1 << 24
"""Products of test and bank items held at a time."""


class _Banked(OpenSetScore):
    """Keeps one vector for each training item taken, and reads the products with them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, k: int, **settings: float) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        super().__init__(weight, bias, k=k, **settings)
        self.k = k
        self._taken: list[Tensor] = []

    def _begin(self) -> None:
        self._taken = []

    def _end(self, number: int) -> None:
        bank = torch.cat(self._taken)
        self._taken = []
        if len(bank) < self.k:
            raise ValueError(f"{self.name} looks at {self.k} neighbours, but holds {len(bank)} training items")
        self.state = {"bank": bank}

    def _products(self, queries: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``read(queries, queries bank^T)``, a few queries at a time."""
        bank = self.state["bank"].to(queries.dtype)
        chunks = queries.split(max(1, ENTRIES // len(bank)))
        return torch.cat([read(some, some @ bank.T) for some in chunks])


class KNN(_Banked):
    """Minus the squared distance to the k-th nearest training item, both at length one (arXiv 2204.06507).

    ``-|z - z_(k)|^2`` with ``z = F / |F|``; a feature of zeros stays zero.

    Args:
        weight, bias: the linear head.
        k: which neighbour, 1 for the nearest.
    """

    name = "knn"

    def __init__(
        self, weight: Float[Tensor, "classes dim"], bias: Float[Tensor, "classes"] | None = None, *, k: int = 50
    ) -> None:
        super().__init__(weight, bias, k)

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        self._taken.append(unit(features))

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        lengths = self.state["bank"].to(features.dtype).square().sum(dim=1)

        def kth(queries: Tensor, products: Tensor) -> Tensor:
            nearness = 2 * products - lengths  # minus the squared distance, but for the query's own length
            return nearness.topk(self.k, dim=1).values[:, -1] - queries.square().sum(dim=1)

        return self._products(unit(features), kth)


class NNGuide(_Banked):
    """Energy, guided by how close confident training items are (arXiv 2309.14888).

    ``logsumexp(l) * mean of the k largest z . g_i``, with ``g_i = z_i logsumexp(l_i)`` of the training items in the
    bank and ``z = F / |F|``.

    The official code fills the bank with the first batches of a shuffled loader until ``fraction`` of the items is
    exceeded. Here every ``1 / fraction``-th item is taken in the order given, the same whatever the batches.

    Args:
        weight, bias: the linear head.
        k: neighbours averaged.
        fraction: share of the training items in the bank, above 0 and at most 1.
    """

    name = "nnguide"

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        *,
        k: int = 100,
        fraction: float = 0.01,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie above 0 and at most at 1, got {fraction}")
        super().__init__(weight, bias, k, fraction=fraction)
        self.fraction = fraction
        self._seen = 0

    def _begin(self) -> None:
        super()._begin()
        self._seen = 0

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        place = torch.arange(self._seen, self._seen + len(features), device=features.device).double()
        self._seen += len(features)
        kept = ((place + 1) * self.fraction).floor() > (place * self.fraction).floor()
        self._taken.append(unit(features[kept]) * logits[kept].logsumexp(dim=1, keepdim=True))

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        guidance = self._products(unit(features), lambda _, products: products.topk(self.k, dim=1).values.mean(dim=1))
        return logits.logsumexp(dim=1) * guidance
