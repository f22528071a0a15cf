"""Attention sinks: tokens known by a massive activation, and what becomes of the attention they draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

HeadRule = Literal["non_sink_share", "sink_share"]


def sink_scores(
    x: Float[Tensor, "batch tokens dim"], dimensions: Sequence[int], eps: float = 1e-6
) -> Float[Tensor, "batch tokens"]:
    """``max over d in dimensions of |x_d| / sqrt(mean(x^2) + eps)`` of each token of a residual stream, in float32.

    Raises:
        ValueError: no dimensions, or ones that the tokens do not have.
    """
    width = x.shape[-1]
    if not len(dimensions) or not all(0 <= d < width for d in dimensions):
        raise ValueError(f"sink dimensions must be some of 0 to {width - 1}, got {list(dimensions)}")
    x = x.float()
    rms = (x.square().mean(dim=-1) + eps).sqrt()
    return x[..., list(dimensions)].abs().amax(dim=-1) / rms


class Redistributed(NamedTuple):
    """What :func:`redistribute_attention` made.

    Attributes:
        weights: the rows, those selected changed.
        selected: which rows were changed, of each head.
        moved: attention taken from the sinks; 0 where nothing was.
    """

    weights: Float[Tensor, "batch heads queries keys"]
    selected: Bool[Tensor, "batch heads queries"]
    moved: Float[Tensor, "batch heads queries"]


def redistribute_attention(
    weights: Float[Tensor, "batch heads queries keys"],
    sinks: Bool[Tensor, "batch keys"],
    image: Bool[Tensor, "batch keys"],
    rows: Bool[Tensor, "batch queries"],
    *,
    moved: float = 0.6,
    rho: float = 0.8,
    min_mass: float = 0.2,
    head_rule: str = "non_sink_share",
    needs_visual_sink: bool = False,
    eps: float = 0.0,
) -> Redistributed:
    """Move attention from sinks to the other image tokens, in the heads that look at the image.

    Of a row ``a`` of a head, ``mass`` is what falls on the image. Where it is at least ``min_mass`` and the share of it
    that is not on sinks is at least ``rho``, every sink keeps ``(1 - moved) a`` and each image token ``j`` that is no
    sink gets ``a_j + W a_j / sum of a over those tokens``, with ``W`` what all sinks gave. The row's sum stays. Rows
    with no attention on such tokens stay as they are. Shares are taken in float32. Source: "See What You Are Told:
    Visual Attention Sink in Large Multimodal Models" (arXiv 2503.03321).

    Args:
        weights: attention behind softmax.
        sinks: the sinks, of text and image.
        image: the image's tokens.
        rows: queries that may be changed.
        moved: share of the sinks' attention that is moved. The official code's setting is ``1 - moved``.
        rho: threshold of the share.
        min_mass: least attention on the image.
        head_rule: ``"non_sink_share"`` asks for that share to be at least ``rho``, as published; ``"sink_share"`` asks
            for the sinks' share to be at most ``rho``, as the official code does.
        needs_visual_sink: change nothing in an item whose image has no sink, as the official code.
        eps: added to every image token in the share's denominator, 1e-6 in the official code.

    Raises:
        ValueError: shares outside their range, an unknown rule, or rows that sum neither to 1 nor (padding) to 0.
    """
    if not (0 <= moved <= 1 and 0 <= min_mass <= 1 and rho >= 0):
        raise ValueError(f"expected moved and min_mass in [0, 1] and rho >= 0, got {moved}, {min_mass}, {rho}")
    if head_rule not in ("non_sink_share", "sink_share"):
        raise ValueError(f"head_rule must be 'non_sink_share' or 'sink_share', got {head_rule!r}")
    a = weights.float()
    sums = a.sum(dim=-1)
    if not bool((((sums - 1).abs() < 0.05) | (sums == 0)).all()):
        raise ValueError("expected attention behind softmax, whose rows sum to 1, got others")
    visual_sinks, receivers = sinks & image, image & ~sinks
    on_image, on_receivers, on_sinks = (_mass(a, part) for part in (image, receivers, visual_sinks))
    total = on_image + eps * image.sum(dim=-1)[:, None, None]
    share = (on_receivers if head_rule == "non_sink_share" else on_sinks) / total.clamp(min=1e-30)
    selected = (share >= rho) if head_rule == "non_sink_share" else (share <= rho)
    selected &= (on_image >= min_mass) & (on_receivers > 0) & rows[:, None]
    if needs_visual_sink:
        selected &= visual_sinks.any(dim=-1)[:, None, None]
    given = moved * _mass(a, sinks) * selected
    selected &= given > 0
    gain = 1 + given / on_receivers.clamp(min=1e-30)
    factor = torch.where(
        sinks[:, None, None], 1 - moved, torch.where(receivers[:, None, None], gain.unsqueeze(-1), 1.0)
    )
    changed = torch.where(selected.unsqueeze(-1), (a * factor).to(weights.dtype), weights)
    return Redistributed(changed, selected, given)


def _mass(weights: Tensor, chosen: Bool[Tensor, "batch keys"]) -> Tensor:
    return (weights * chosen[:, None, None]).sum(dim=-1)
