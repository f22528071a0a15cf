"""Common corruptions of images, each at five severities and drawn from a seed.

A small set in the spirit of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), for images of any size: lengths
are shares of the shorter side, so that a digit of 8 pixels and a photograph of 224 lose about as much. Noise, impulse
and JPEG levels are those of ImageNet-C; the rest is a choice of this library, so that numbers compare models here and
are no ImageNet-C numbers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(
    images: Float[Tensor, "batch channels height width"], name: str, severity: int, seed: int = 0
) -> Float[Tensor, "batch channels height width"]:
    """Images in [0, 1] corrupted, in [0, 1] again.

    Args:
        images: grey or colour.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seed: of everything that is drawn; the same seed corrupts a batch alike.

    Raises:
        ValueError: an unknown name, a severity outside of 1 .. 5, pixels outside of [0, 1].
        ImportError: ``"jpeg"`` without Pillow.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1 to 5, got {severity}")
    if images.numel() and not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise ValueError("pixels must lie in [0, 1]: corrupt images before they are normalised")
    generator = torch.Generator().manual_seed(seed)
    return CORRUPTIONS[name](images, severity - 1, generator).clamp(0, 1).to(images.dtype)


def _normal(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator).to(images)


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(images.shape, generator=generator).to(images)


def _gaussian_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * _normal(x, generator)


def _shot_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Counts of photons."""
    photons = (60, 25, 12, 5, 3)[level]
    return (torch.poisson(x.cpu().float() * photons, generator=generator) / photons).to(x)


def _impulse_noise(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Salt and pepper in equal shares."""
    draw, share = _uniform(x, generator), (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, x))


def _gaussian_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    sigma = (0.03, 0.045, 0.06, 0.08, 0.11)[level] * min(x.shape[2:])
    reach = math.ceil(3 * sigma)
    # The share of the bell over each pixel, which is a blur for a sigma well below a pixel too.
    edges = torch.erf((torch.arange(-reach, reach + 2) - 0.5) / (sigma * math.sqrt(2)))
    kernel = edges.diff()
    return _filter(x, kernel[:, None] * kernel)


def _defocus_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """A disc whose border falls off within a pixel."""
    radius = (0.05, 0.07, 0.1, 0.13, 0.17)[level] * min(x.shape[2:])
    reach = math.ceil(radius) + 1
    place = torch.arange(-reach, reach + 1)
    return _filter(x, (radius + 1 - torch.hypot(place[:, None].float(), place.float())).clamp(0, 1))


def _motion_blur(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """A straight stroke in one direction for the batch."""
    length = (0.1, 0.15, 0.2, 0.28, 0.36)[level] * min(x.shape[2:])
    angle = math.pi * torch.rand((), generator=generator).item()
    reach = math.ceil(length / 2) + 1
    place = torch.arange(-reach, reach + 1).float()
    along = place[:, None] * math.sin(angle) + place * math.cos(angle)
    across = place[:, None] * math.cos(angle) - place * math.sin(angle)
    return _filter(x, (length / 2 + 1 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(0, 1))


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """The same odd kernel, scaled to sum 1, over every channel; borders repeat."""
    kernel = (kernel / kernel.sum()).to(x)
    rows, columns = (side // 2 for side in kernel.shape)
    padded = F.pad(x, (columns, columns, rows, rows), mode="replicate")
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), kernel[None, None]).squeeze(1).unflatten(0, x.shape[:2])


def _brightness(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    return x + (0.1, 0.2, 0.3, 0.4, 0.5)[level]


def _contrast(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + (x - mean) * (0.7, 0.5, 0.4, 0.3, 0.2)[level]


def _fog(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """A light cloud over each image: noise of four octaves, each half as strong at half the size of the one before."""
    batch, _, height, width = x.shape
    cloud = torch.zeros(batch, 1, height, width)
    for octave in range(4):
        cells = min(2 ** (octave + 1), height, width)
        coarse = torch.rand(batch, 1, cells, cells, generator=generator)
        cloud += 0.5**octave * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    strength = (0.5, 0.8, 1.1, 1.4, 1.8)[level]
    return (x + strength * (cloud / 1.875).to(x)) / (1 + strength)


def _pixelate(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    size = tuple(max(1, round(share * side)) for side in x.shape[2:])
    return F.interpolate(F.interpolate(x, size, mode="area"), x.shape[2:], mode="nearest")


def _jpeg(x: Tensor, level: int, generator: torch.Generator) -> Tensor:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("JPEG compression needs Pillow: pip install pillow") from None
    if x.shape[1] not in (1, 3):
        raise ValueError(f"JPEG takes 1 or 3 channels, got {x.shape[1]}")
    import numpy as np

    pixels = (x.detach().cpu().float() * 255).round().byte().movedim(1, -1).numpy()
    decoded = []
    for each in pixels:
        file = io.BytesIO()
        Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each).save(
            file, "JPEG", quality=(25, 18, 15, 10, 7)[level]
        )
        decoded.append(np.asarray(Image.open(file)).reshape(each.shape))
    return torch.from_numpy(np.stack(decoded)).movedim(-1, 1).to(x) / 255


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "gaussian_blur": _gaussian_blur,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "fog": _fog,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
"""By name: ``corruption(images, level 0 .. 4, generator)``."""
