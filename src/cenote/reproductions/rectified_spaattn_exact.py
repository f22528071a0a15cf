"""What holds of Rectified SpaAttn whatever the data."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.ops.rectified_attention import rectified_attention
from cenote.ops.space_filling_curve import hilbert_order, inverse_order
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings

BLOCK = 16


def exact_findings() -> list[Finding]:
    """The reference files, the dense limits, constant blocks, sums of masses, the curve."""
    return [*golden_findings("rectified-spaattn"), *_dense_limits(), *_constant_blocks(), *_masses(), *_curve()]


def _random(text: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(text)
    return list(torch.randn(3, 2, 4, 192 + text, 32, generator=g, dtype=torch.float64))


def _dense_limits() -> list[Finding]:
    away, factor, correction = [], [], []
    for text in (0, 32):
        q, k, v = _random(text)
        dense = F.scaled_dot_product_attention(q, k, v)
        limits: list[dict[str, Any]] = [{"p": 1.0}, {"top_k": 12, "p": 1e-6}]
        for limit in limits:
            result = rectified_attention(q, k, v, block_size=BLOCK, text_len=text, **limit)
            away.append(_away(result.output, dense))
            factor.append(_away(result.kept_mass, torch.ones_like(result.kept_mass)))
            correction.append(float(result.compensated.sum()))
    return [
        at_most(
            "Keeping everything, by p = 1 or by top_k, is dense attention, with text and without.", max(away), 1e-12
        ),
        at_most("Then the factor R is 1.", max(factor), 0),
        at_most("Then nothing is added back.", max(correction), 0, "blocks"),
    ]


def _constant_blocks() -> list[Finding]:
    rectified, plain = [], []
    for text in (0, 32):
        q, k, v = _random(text)
        for x in (q, k, v):
            blocks = x[:, :, :192].unflatten(2, (-1, BLOCK))
            blocks.copy_(blocks[:, :, :, :1].expand_as(blocks).clone())
        dense = F.scaled_dot_product_attention(q, k, v)
        for top_k in (1, 3, 6, 9):
            settings: dict[str, Any] = {"block_size": BLOCK, "top_k": top_k, "p": 1e-6, "text_len": text}
            rectified.append(_away(rectified_attention(q, k, v, compensate="all", **settings).output, dense))
            plain.append(_away(rectified_attention(q, k, v, compensate="none", **settings).output, dense))
    return [
        at_most(
            "With queries, keys and values constant in every block and all dropped blocks added back, the output is "
            "that of dense attention at every density.",
            max(rectified),
            1e-12,
        ),
        finding(
            "Plain block-sparse attention over the same blocks is not.",
            "above 0.01",
            min(plain),
            lambda v: v > 0.01,
            unit="max abs difference",
        ),
    ]


def _masses() -> list[Finding]:
    rows, together, added = [], [], 0
    for text in (0, 32):
        q, k, v = _random(text)
        result = rectified_attention(q, k, v, block_size=BLOCK, top_k=3, p=1e-6, text_len=text)
        back = (result.probs[..., :12] * result.compensated).sum(-1)
        rows.append(_away(result.probs.sum(-1), torch.ones_like(back)))
        together.append(_away(result.kept_mass + back, torch.ones_like(back)))
        added += int(result.compensated.sum())
    note = f"{added} blocks were added back."
    return [
        at_most("The estimated masses of a row sum to 1.", max(rows), 1e-12),
        at_most("The factor R and the mass that is added back sum to 1.", max(together), 1e-12, note=note),
    ]


def _curve() -> list[Finding]:
    missed, jumps, restored = 0, 0, 0
    for shape in [*product((1, 2, 3, 4, 5, 6, 8), repeat=3), (9, 16, 30)]:
        order = hilbert_order(shape)
        cells = torch.arange(len(order))
        missed += int((order.sort().values != cells).sum())
        restored += int((cells[order][inverse_order(order)] != cells).sum())
        if all(n % 2 == 0 for n in shape):
            jumps += int((_steps(order, shape) != 1).sum())
    odd = {axes: int((_steps(hilbert_order((5, 6, 7), axes), (5, 6, 7)) != 1).sum()) for axes in ("wht", "hwt", "twh")}
    note = "Other than one step, by axis order: " + ", ".join(f"{axes} {n}" for axes, n in odd.items()) + "."
    return [
        at_most("The curve visits every cell once (344 grids).", missed, 0, "cells"),
        at_most("Permuting the tokens and restoring them is the identity.", restored, 0, "cells"),
        at_most("On grids of even extents consecutive cells differ by one step.", jumps, 0, "longer steps"),
        at_most(
            "On the odd grid 5 x 6 x 7 a few of 209 steps are longer.", max(odd.values()), 10, "longer steps", note
        ),
    ]


def _steps(order: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.stack(torch.unravel_index(order, shape), dim=1).diff(dim=0).abs().sum(1)


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
