"""Open-set scores of the logits alone: MSP, MaxLogit, Energy."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cenote.inspection.open_set_base import OpenSetScore


class MSP(OpenSetScore):
    """Maximum softmax probability, ``max_k softmax(l)_k`` (arXiv 1610.02136). Needs no fit."""

    name, passes = "msp", 0

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1).amax(dim=1)


class MaxLogit(OpenSetScore):
    """The largest logit, ``max_k l_k`` (arXiv 1911.11132). Needs no fit."""

    name, passes = "maxlogit", 0

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return logits.amax(dim=1)


class Energy(OpenSetScore):
    """Negative free energy, ``T log sum_k exp(l_k / T)`` (arXiv 2010.03759). Needs no fit.

    Args:
        temperature: T, positive.
    """

    name, passes = "energy", 0

    def __init__(
        self,
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, "classes"] | None = None,
        *,
        temperature: float = 1.0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(weight, bias, temperature=temperature)
        self.temperature = temperature

    def _score(self, features: Tensor, logits: Tensor) -> Tensor:
        return self.temperature * (logits / self.temperature).logsumexp(dim=1)
