"""Group generalised mean pooling (GGeM)."""

from __future__ import annotations

from typing import Literal

from cenote.pooling.power_mean import PowerMeanPooling


class GGeM(PowerMeanPooling):
    """Power mean over tokens with one learned exponent for each group of channels.

    ``f_c = (1/n sum_n max(x_nc, eps)^p_g)^(1/p_g)``, channel ``c`` in group ``g = floor(c / (dim / num_groups))``.
    Source: "Group Generalized Mean Pooling for Vision Transformer" (arXiv 2212.04114). Parameters: ``num_groups``.
    The paper's groups are the heads of the backbone (12 for a ViT-B); the default 8 divides the usual widths. One
    group is GeM, ``dim`` groups give each channel its own exponent. Arguments, errors and the treatment of negative
    tokens: :class:`~cenote.pooling.power_mean.PowerMeanPooling`.
    """

    name = "ggem"
    paper = "ggem"

    def __init__(
        self,
        dim: int,
        num_groups: int = 8,
        p: float = 3.0,
        trainable: bool = True,
        eps: float = 1e-6,
        offset: bool = False,
        parametrisation: Literal["plain", "softplus"] = "plain",
    ) -> None:
        super().__init__(dim, num_groups, p, trainable, eps, offset, parametrisation)
