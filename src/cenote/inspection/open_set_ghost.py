"""GHOST: the logit over how far the feature lies from its class, dimension by dimension."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.inspection.open_set_base import OpenSetScore
from cenote.inspection.open_set_pareto import fit_pareto, pareto_cdf


class GHOST(OpenSetScore):
    """The CDF of the predicted class's generalised Pareto at ``l_k / sum_d |F_d - mean_kd| / std_kd``.

    Mean and unbiased standard deviation of each feature, and the distribution, come from the training items of class k
    that are classified correctly. A feature that never varies counts for nothing. Source: "GHOST: Gaussian Hypothesis
    Open-Set Technique" (arXiv 2502.03359), after its official code.

    Sums are taken of differences to the first item of each class, so that a constant feature has deviation exactly 0.

    Args:
        weight, bias: the linear head.
        pareto: shape, location and scale for every class, ``(classes, 3)``, in place of a fit.

    Raises:
        ValueError: as :class:`OpenSetScore`; a class with fewer than two correctly classified training items.
    """

    name, passes = "ghost", 2

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        *,
        pareto: Float[Tensor, "rows three"] | None = None,
    ) -> None:
        super().__init__(weight, bias)
        if pareto is not None and pareto.shape != (self.classes, 3):
            raise ValueError(f"pareto must be ({self.classes}, 3): shape, location, scale; got {tuple(pareto.shape)}")
        self.given = None if pareto is None else pareto.detach().double().to(self.weight.device)
        if pareto is not None:
            self.passes = 1

    def normalised_logit(self, features: Float[Tensor, "items dim"]) -> Float[Tensor, "items"]:
        """The largest logit over the summed deviations from the predicted class. Errors as :meth:`score`."""
        self._require_fit()
        return self._normalised(self._checked(features), self.logits(features))[0]

    def _begin(self) -> None:
        shape, device = (self.classes, self.dim), self.weight.device
        self._pivot, self._first, self._second = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)
        )
        self._counts = torch.zeros(self.classes, dtype=torch.int64, device=device)
        self._scores: list[tuple[Tensor, Tensor]] = []

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        right = logits.argmax(dim=1) == labels
        labels, features, logits = labels[right], features[right], logits[right]
        if number == 1:
            self._scores.append((labels, self._normalised(features, logits)[0]))
            return
        x = features.double()
        for k in labels[self._counts[labels] == 0].unique().tolist():
            self._pivot[k] = x[int((labels == k).nonzero()[0])]
        away = x - self._pivot[labels]
        self._first.index_add_(0, labels, away)
        self._second.index_add_(0, labels, away.square())
        self._counts += labels.bincount(minlength=self.classes)

    def _end(self, number: int) -> None:
        if number == 0:
            few = (self._counts < 2).nonzero().flatten().tolist()
            if few:
                raise ValueError(
                    f"class(es) {few[:10]} have fewer than 2 correctly classified training items: no deviation"
                )
            n = self._counts[:, None]
            variance = (self._second - self._first.square() / n).clamp_min(0) / (n - 1)
            self.state = {"mean": self._pivot + self._first / n, "std": variance.sqrt()}
        if self.given is not None:
            self.state["pareto"] = self.given
        elif number == 1:
            labels, scores = (torch.cat(parts) for parts in zip(*self._scores, strict=True))
            fits = [fit_pareto(scores[labels == k]) for k in range(self.classes)]
            self.state["pareto"] = torch.stack(fits).to(labels.device)

    def _normalised(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        top, predicted = logits.max(dim=1)
        mean, std = self.state["mean"][predicted], self.state["std"][predicted]
        away = (features.double() - mean).abs() / torch.where(std > 0, std, torch.inf)
        tiny = torch.finfo(torch.float32).tiny
        return (top.double() / away.sum(dim=1).clamp_min(tiny)).to(features.dtype), predicted

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        normalised, predicted = self._normalised(features, logits)
        return pareto_cdf(normalised, self.state["pareto"][predicted]).to(features.dtype)
