"""Tokens on grids whose neighbours are alike, and how far sparse attention over them is from dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.ops.rectified_attention import Rectified, rectified_attention
from cenote.ops.space_filling_curve import GridShape, hilbert_order

HEADS, HEAD_DIM = 4, 32


class Attention(NamedTuple):
    """Queries, keys and values ``(1, heads, tokens, head_dim)`` in raster order, and their grid."""

    query: Tensor
    key: Tensor
    value: Tensor
    shape: GridShape


class Errors(NamedTuple):
    """Distance from dense attention over its length, of both kinds of sparse attention over the same blocks."""

    plain: float
    rectified: float
    density: float
    accepted: float
    """Share of the dropped blocks that passed the gain test."""

    @property
    def fall(self) -> float:
        """By how many per cent the error falls."""
        return 100 * (1 - self.rectified / self.plain)


def smooth_field(seed: int, noise: float = 0.25, shape: GridShape = (8, 16, 16), channels: int = 32) -> Attention:
    """White noise on a grid, averaged twice over windows of 5, standardised, plus noise of deviation ``noise``."""
    g = torch.Generator().manual_seed(seed)
    field = torch.randn(1, channels, *(n + 8 for n in shape), generator=g)
    for _ in range(2):
        field = F.avg_pool3d(field, 5, stride=1)
    tokens = _standard(field.flatten(2)[0].T)
    return _projected(tokens + noise * torch.randn(tokens.shape, generator=g), shape, g)


def fashion_tiles(path: Path, seed: int, zoom: int = 1, side: int = 56) -> Attention:
    """A sheet of random test images of Fashion-MNIST, enlarged ``zoom`` times, cut into patches of 4 x 4 pixels."""
    with np.load(path, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["test_x"]).float().view(-1, 28, 28) / 255
    g = torch.Generator().manual_seed(seed)
    tiles = side // (7 * zoom)
    picked = images[torch.randperm(len(images), generator=g)[: tiles * tiles]]
    sheet = picked.view(tiles, tiles, 28, 28).transpose(1, 2).reshape(1, 1, tiles * 28, tiles * 28)
    sheet = F.interpolate(sheet, scale_factor=zoom, mode="bilinear", align_corners=False) if zoom > 1 else sheet
    patches = sheet.view(side, 4, side, 4).transpose(1, 2).reshape(side * side, 16)
    return _projected(_standard(patches), (1, side, side), g)


def noise_tokens(seed: int, shape: GridShape = (8, 16, 16)) -> Attention:
    """Independent normal queries, keys and values."""
    g = torch.Generator().manual_seed(seed)
    tokens = shape[0] * shape[1] * shape[2]
    query, key, value = torch.randn(3, 1, HEADS, tokens, HEAD_DIM, generator=g)
    return Attention(query, key, value, shape)


def errors(world: Attention, density: float, block_size: int = 64, curve: bool = True) -> Errors:
    """Plain and rectified attention over the blocks of largest estimated mass, so many in every row."""
    count = world.shape[0] * world.shape[1] * world.shape[2]
    order = hilbert_order(world.shape) if curve else torch.arange(count)
    query, key, value = (x[:, :, order] for x in world[:3])
    dense = F.scaled_dot_product_attention(query, key, value)
    blocks = -(-count // block_size)

    def away(compensate: str) -> tuple[float, Rectified]:
        result = rectified_attention(
            query, key, value, block_size=block_size, p=1e-9, top_k=max(1, round(density * blocks)),
            compensate=compensate, backend="torch",
        )  # fmt: skip
        return float((result.output - dense).norm() / dense.norm()), result

    (plain, _), (rectified, result) = away("none"), away("gain")
    dropped = (~result.block_mask).sum().clamp_min(1)
    return Errors(plain, rectified, float(result.block_mask.float().mean()), float(result.compensated.sum() / dropped))


def _standard(tokens: Tensor) -> Tensor:
    """Every channel with mean 0 and deviation 1 over the tokens."""
    return (tokens - tokens.mean(0)) / tokens.std(0).clamp_min(1e-6)


def _projected(tokens: Tensor, shape: GridShape, g: torch.Generator) -> Attention:
    """Random projections by head; keys and queries are alike, so that alike tokens attend each other."""
    width = tokens.shape[1]

    def weight() -> Tensor:
        return torch.randn(HEADS, width, HEAD_DIM, generator=g) * width**-0.5

    shared, own = weight(), (weight(), weight())
    query, key = (tokens @ ((shared + part) / 2**0.5) for part in own)
    return Attention(query[None], key[None], (tokens @ weight())[None], shape)


def mean_errors(runs: Sequence[Errors]) -> str:
    """ "plain / rectified" over runs, for a note."""
    plain, rectified = (sum(getattr(run, name) for run in runs) / len(runs) for name in ("plain", "rectified"))
    return f"{plain:.3f} to {rectified:.3f}"
