"""PostMax: the largest logit over the feature's length, as a probability."""

from __future__ import annotations

import torch
from torch import Tensor

from cenote.inspection.open_set_base import OpenSetScore
from cenote.inspection.open_set_pareto import fit_pareto, pareto_cdf


class PostMax(OpenSetScore):
    """The CDF of one generalised Pareto at ``l_k / |F|_2``, fitted on correctly classified training items.

    Source: "Operational Open-Set Recognition and PostMax Refinement" (ECCV 2024). The rule is taken from its abstract
    and a figure caption; details are inferred. A feature of zeros is divided by the smallest number instead.

    Raises:
        ValueError: as :class:`OpenSetScore`; fewer than two correctly classified training items.
    """

    name = "postmax"

    def _begin(self) -> None:
        self._scores: list[Tensor] = []

    def _observe(self, number: int, features: Tensor, labels: Tensor, logits: Tensor) -> None:
        right = logits.argmax(dim=1) == labels
        self._scores.append(_ratio(features[right], logits[right]))

    def _end(self, number: int) -> None:
        self.state = {"pareto": fit_pareto(torch.cat(self._scores)).to(self.weight.device)}
        self._scores = []

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        ratio = _ratio(features, logits)
        return pareto_cdf(ratio, self.state["pareto"].expand(len(ratio), 3)).to(features.dtype)


def _ratio(features: Tensor, logits: Tensor) -> Tensor:
    return logits.amax(dim=1) / features.norm(dim=1).clamp_min(torch.finfo(features.dtype).tiny)
