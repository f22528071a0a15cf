"""Patch-wise augmentation: each patch of an image is changed by itself, on a coin of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def augment_patches(
    images: Float[Tensor, "batch channels height width"],
    patch_size: int,
    *,
    chance: float = 0.1,
    noise: float = 0.01,
    smallest_crop: float = 0.85,
    low: Float[Tensor, "#channels 1 1"] | float | None = None,
    high: Float[Tensor, "#channels 1 1"] | float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Each patch gets, with ``chance`` each and in this order, a resized square crop, Gaussian noise and a mirror.

    The augmentation of RVT (Mao et al., arXiv 2105.07926), with the official numbers as defaults.

    Args:
        images: normalised or not.
        patch_size: side of a patch; must divide the image.
        chance: of each of the three changes, for each patch.
        noise: standard deviation of the noise.
        smallest_crop: smallest share of a patch's area that is cropped and stretched over it.
        low, high: smallest and largest pixel, for instance ``(0 - mean) / std``; ``None`` for no limit.
        generator: draws everything, on the CPU; ``None`` for torch's own.

    Raises:
        ValueError: a patch size that does not divide the image, a chance or share outside of [0, 1].
    """
    batch, channels, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} do not divide images of {height} x {width}")
    if not 0 <= chance <= 1 or not 0 < smallest_crop <= 1:
        raise ValueError(f"expected a chance in [0, 1] and a crop in (0, 1], got {chance} and {smallest_crop}")
    rows, columns, side = height // patch_size, width // patch_size, patch_size
    patches = images.unflatten(3, (columns, side)).unflatten(2, (rows, side))
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(images)

    def chosen() -> Tensor:
        return draw(len(patches), 1, 1, 1) < chance

    patches = torch.where(chosen(), _crops(patches, draw(len(patches), 3), smallest_crop), patches)
    drawn = torch.randn(patches.shape, generator=generator).to(images)
    patches = torch.where(chosen(), patches + noise * drawn, patches)
    patches = torch.where(chosen(), patches.flip(3), patches)
    back = patches.reshape(batch, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    changed = back.reshape(images.shape)
    return changed if low is None and high is None else changed.clamp(low, high)  # type: ignore[arg-type]


def _crops(patches: Tensor, draw: Tensor, smallest: float) -> Tensor:
    """A square of a drawn area at a drawn place of each patch, stretched over it."""
    side = (smallest + (1 - smallest) * draw[:, 0]).sqrt()
    centre = (2 * draw[:, 1:] - 1) * (1 - side)[:, None]
    scale = torch.diag_embed(side[:, None].expand(-1, 2))
    where = F.affine_grid(torch.cat([scale, centre[:, :, None]], dim=2), list(patches.shape), align_corners=False)
    return F.grid_sample(patches, where, padding_mode="border", align_corners=False)
