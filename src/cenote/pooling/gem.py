"""Generalised mean pooling (GeM)."""

from __future__ import annotations

from typing import Literal

from cenote.pooling.power_mean import PowerMeanPooling


class GeM(PowerMeanPooling):
    """Power mean over tokens with one learned exponent, ``f = (1/n sum_n max(x_n, eps)^p)^(1/p)``.

    Source: "Fine-tuning CNN Image Retrieval with No Human Annotation" (arXiv 1711.02512). Parameters: 1. Arguments,
    errors and the treatment of negative tokens: :class:`~cenote.pooling.power_mean.PowerMeanPooling` with one group.
    """

    name = "gem"

    def __init__(
        self,
        dim: int,
        p: float = 3.0,
        trainable: bool = True,
        eps: float = 1e-6,
        offset: bool = False,
        parametrisation: Literal["plain", "softplus"] = "plain",
    ) -> None:
        super().__init__(dim, 1, p, trainable, eps, offset, parametrisation)
