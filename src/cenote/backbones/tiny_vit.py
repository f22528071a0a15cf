"""A vision transformer small enough to ship inside a package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.types import Grid


@dataclass(frozen=True)
class TinyViTConfig:
    """Shape of a :class:`TinyViT` and the scaling of its input.

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch; must divide ``image_size``.
        channels: 1 (grey) or 3 (colour).
        dim, depth, heads, mlp_ratio: width, blocks, heads, hidden width of the MLP over ``dim``.
        mean, std: one value a channel, subtracted from and divided into pixels in [0, 1].
    """

    image_size: int = 8
    patch_size: int = 2
    channels: int = 1
    dim: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size={self.image_size}, got {self.patch_size}")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim must be a multiple of heads={self.heads} and of 4, got {self.dim}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} values, got {self.mean} and {self.std}")

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return Grid(side, side)


def sincos_positions(grid: Grid, dim: int) -> Float[Tensor, "tokens dim"]:
    """Fixed positions, one row a patch: a quarter of ``dim`` each for sine and cosine of row and column."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    angles = [axis.reshape(-1, 1).float() * frequencies for axis in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def to_patches(
    images: Float[Tensor, "batch channels height width"], patch_size: int
) -> Float[Tensor, "batch tokens pixels"]:
    """Cut images into patches, row by row; pixels of a patch in (channel, row, column) order."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm self-attention and MLP, each added to its input."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.proj(mixed)
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Patches and a class token through pre-norm blocks; returns the tokens after the final norm.

    ``norm(block_depth(... block_1([class; W patch + b + position])))``, ``(batch, 1 + patches, dim)``. Positions are
    fixed sines and cosines, so only patch projection, class token, blocks and the final norm have weights.
    """

    blocks: nn.ModuleList
    positions: Tensor

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch_size**2
        self.patch = nn.Linear(pixels, config.dim)
        self.class_token = nn.Parameter(torch.empty(config.dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.register_buffer("positions", sincos_positions(config.grid, config.dim), persistent=False)

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches dim"]:
        """Projected patches with their positions, without the class token."""
        return self.patch(to_patches(images, self.config.patch_size)) + self.positions

    def encode(self, patches: Float[Tensor, "batch kept dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Class token in front, blocks, final norm. Any of the patches will do: masked autoencoding leaves some out."""
        tokens = torch.cat([self.class_token.expand(patches.shape[0], 1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        return self.encode(self.embed(images))
