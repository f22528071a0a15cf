"""Which rule weighs the calibration tokens of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.token_importance import (
    Position,
    Power,
    activation_difference,
    activation_norm,
    attention_concentration,
    check_range,
    chunk_weights,
    is_chunk_rule,
    scale_importance,
    token_distance,
    token_rarity,
)

RULES = ("attncon", "actnorm", "actdiff", "tokensim", "tokenfreq", "equal")
Need = Literal["attention", "output", "input", "ids", "position"]


@dataclass(frozen=True)
class Importance:
    """How calibration tokens are weighed, for each layer and sequence by itself.

    ``w = (s - min s) / (max s - min s) (r_max - r_min) + r_min`` with raw scores ``s`` of the rule:

    - ``"attncon"``: attention received in this layer, summed over heads and queries;
    - ``"actnorm"``: ``|x_j|``, ``"actdiff"``: ``-|x_j - y_j|`` with the layer's output ``y`` before it is quantised;
    - ``"tokensim"``: mean squared distance to the sequence's tokens;
    - ``"tokenfreq"``: minus how often the token's id occurs in the calibration set;
    - ``"equal"``: 1 for all, which makes plain GPTQ;
    - ``"0_1_8"``, ``"first_half"``, ``"first_128"``, ...: weights by position that are not rescaled, see
      :func:`cenote.ops.token_importance.chunk_weights`.

    Args:
        rule: see above.
        r_min: smallest weight.
        r_max: largest weight.
        quantile: quantiles ``1 - quantile`` and ``quantile`` instead of minimum and maximum.
        bins: number of values that weights are rounded to.
        truncate: share of the tokens, those of the lowest scores, that get weight 0.
        power: of attncon's scores, ``"none"``, ``"square"`` or ``"sqrt"``.
        position: divides attncon's scores by the number of queries behind each token (``"count"``) or its root
            (``"sqrt"``), after the power.

    Raises:
        ValueError: an unknown rule or settings out of range.
    """

    rule: str = "attncon"
    r_min: float = 0.005
    r_max: float = 1.0
    quantile: float | None = None
    bins: int | None = None
    truncate: float = 0.0
    power: Power = "none"
    position: Position = "none"

    def __post_init__(self) -> None:
        if self.rule not in RULES and not is_chunk_rule(self.rule):
            raise ValueError(
                f"importance must be one of {', '.join(RULES)} or a rule such as '0_1_8', got {self.rule!r}"
            )
        if self.power not in ("none", "square", "sqrt") or self.position not in ("none", "count", "sqrt"):
            raise ValueError(
                f"expected power 'none', 'square' or 'sqrt' and position 'none', 'count' or 'sqrt', got {self.power!r} "
                f"and {self.position!r}"
            )
        check_range(self.r_min, self.r_max, self.quantile, self.bins, self.truncate)

    @property
    def need(self) -> Need:
        """What the scores are made of."""
        needs: dict[str, Need] = {"attncon": "attention", "actdiff": "output", "tokenfreq": "ids"}
        return needs.get(self.rule, "input" if self.rule in ("actnorm", "tokensim") else "position")

    def weights(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        received: Float[Tensor, "batch tokens"] | None = None,
        y: Float[Tensor, "batch tokens dim"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
        counts: Int[Tensor, "symbols"] | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Weights of one batch: 0 on padding, before they are brought to mean 1.

        Args:
            x: the layer's input.
            mask: real tokens.
            received: attention received, where :attr:`need` is ``"attention"``.
            y: the layer's output, for ``"output"``.
            ids: token ids, for ``"ids"``.
            counts: occurrences of each id, for ``"ids"``.
        """
        if self.need == "position":
            return self._by_position(x, mask)
        if self.rule == "attncon":
            assert received is not None
            scores = attention_concentration(received, mask, self.power, self.position)
        elif self.rule == "actdiff":
            assert y is not None
            scores = activation_difference(x, y)
        elif self.rule == "tokenfreq":
            assert ids is not None
            assert counts is not None
            scores = token_rarity(ids, counts)
        else:
            scores = activation_norm(x) if self.rule == "actnorm" else token_distance(x, mask)
        return scale_importance(
            scores, mask, self.r_min, self.r_max, quantile=self.quantile, bins=self.bins, truncate=self.truncate
        )

    def _by_position(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weights = torch.zeros(x.shape[:2], device=x.device)
        for row in range(len(x)):
            real = torch.ones(x.shape[1], dtype=torch.bool, device=x.device) if mask is None else mask[row]
            length = int(real.sum())
            weights[row, real] = 1.0 if self.rule == "equal" else chunk_weights(self.rule, length).to(x.device)
        return weights
