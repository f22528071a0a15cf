"""What the power-mean poolings GeM and GGeM share."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cenote.ops.masked import widen
from cenote.ops.power import clamped_fraction, power_mean
from cenote.pooling.base import Pooling


class PowerMeanPooling(Pooling):
    """Power mean over tokens with one learned exponent for each of ``num_groups`` contiguous groups of channels.

    ``f_c = (1/n sum_n max(x_nc - o_c, eps)^p_g)^(1/p_g)``, channel ``c`` in group
    ``g = floor(c / (dim / num_groups))``.

    Tokens are signed and everything below ``eps`` is clamped away, value and gradient, as is usual for this family;
    :meth:`clamped_fraction` says how much, and an offset ``o`` (:meth:`fit_offset`) avoids it. Exponents take part
    clamped to ``[p_min, p_max] = [0.01, 1000]``; a plain exponent that reaches the clamp gets no gradient and stays,
    which ``parametrisation="softplus"``, ``p = p_min + softplus(raw_p)``, cannot. Exponents must not be decayed:
    towards zero ``1/p`` diverges.

    Args:
        dim: token width; must be divisible by ``num_groups``.
        num_groups: number G of groups.
        p: initial exponent.
        trainable: whether exponents are learned.
        eps: smallest token value.
        offset: subtract a stored vector ``(dim,)`` before clamping, zero until :meth:`fit_offset`. Not added back.
        parametrisation: ``"plain"`` (parameter ``p``) or ``"softplus"`` (parameter ``raw_p``).

    Raises:
        ValueError: ``num_groups`` does not divide ``dim``, or ``p`` or ``eps`` is out of range.
    """

    no_weight_decay_parameters = ("p", "raw_p")
    p_min, p_max = 1e-2, 1e3
    offset: Tensor | None

    def __init__(
        self,
        dim: int,
        num_groups: int,
        p: float,
        trainable: bool,
        eps: float,
        offset: bool,
        parametrisation: Literal["plain", "softplus"],
    ) -> None:
        super().__init__(dim)
        if num_groups < 1 or dim % num_groups:
            divisors = [g for g in range(1, dim + 1) if dim % g == 0]
            raise ValueError(f"num_groups must divide dim={dim} (one of {divisors}), got {num_groups}")
        if not self.p_min < p <= self.p_max:
            raise ValueError(f"the initial p must lie in ({self.p_min}, {self.p_max}], got {p}")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be positive, got {eps}")
        if parametrisation not in ("plain", "softplus"):
            raise ValueError(f"parametrisation must be 'plain' or 'softplus', got {parametrisation!r}")
        self.num_groups, self.eps, self.parametrisation = num_groups, eps, parametrisation
        self.register_buffer("offset", torch.zeros(dim) if offset else None)
        self._exponent = "p" if parametrisation == "plain" else "raw_p"
        self.register_parameter(self._exponent, nn.Parameter(torch.empty(num_groups), requires_grad=trainable))
        self.set_exponents(torch.full((num_groups,), float(p)))

    @property
    def exponents(self) -> Tensor:
        """The exponents as used, ``(num_groups,)``."""
        raw = getattr(self, self._exponent)
        p = raw if self.parametrisation == "plain" else self.p_min + nn.functional.softplus(raw)
        return p.clamp(self.p_min, self.p_max)

    @torch.no_grad()
    def set_exponents(self, p: Tensor) -> None:
        """Set all exponents; ``ValueError`` unless they are ``(num_groups,)``, finite and positive."""
        if tuple(p.shape) != (self.num_groups,):
            raise ValueError(f"p must have shape ({self.num_groups},), got {tuple(p.shape)}")
        if not bool((p.isfinite() & (p > 0)).all()):
            raise ValueError(f"p must be finite and positive, got {p.tolist()}")
        if self.parametrisation == "softplus":
            above = (p.double() - self.p_min).clamp(min=1e-6)
            p = above + (-(-above).expm1()).log()  # inverse of softplus
        getattr(self, self._exponent).copy_(p)

    @torch.no_grad()
    def fit_offset(self, tokens: Tensor, mask: Tensor | None = None, extend: bool = False) -> None:
        """Set the offset to each channel's minimum over the real tokens of the training data, ``(batch, tokens, dim)``.

        With ``extend`` the stored offset is only lowered, to go through the data batch by batch.

        Raises:
            ValueError: the pooling was built without ``offset=True``.
        """
        if self.offset is None:
            raise ValueError(f"this {type(self).__name__} has no offset: build it with offset=True")
        self.check(tokens, mask)
        real = tokens.flatten(0, 1) if mask is None else tokens[mask]
        lowest = real.amin(dim=0).to(self.offset.dtype)
        self.offset.copy_(torch.minimum(self.offset, lowest) if extend else lowest)

    def clamped_fraction(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Share of real token entries below ``eps`` (after the offset), which pooling discards; a scalar in 0..1."""
        self.check(tokens, mask)
        return clamped_fraction(self._shift(tokens), mask, self.eps)

    def _shift(self, tokens: Tensor) -> Tensor:
        return tokens if self.offset is None else widen(tokens) - self.offset

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        p = self.exponents.unsqueeze(1).expand(-1, self.dim // self.num_groups).flatten()
        return power_mean(self._shift(tokens), p, mask, self.eps).to(tokens.dtype), None

    @classmethod
    def from_reference(cls, state_dict: dict[str, Tensor], **config: Any) -> PowerMeanPooling:
        """From a plain tensor of exponents, key ``p`` ``(num_groups,)``; ``config`` holds the options.

        No official code is known; this is the format that GeM layers share. Other values of ``parametrisation`` are
        converted.
        """
        p = state_dict["p"].reshape(-1)
        pool = cls(**config)
        pool.set_exponents(p)
        return pool
