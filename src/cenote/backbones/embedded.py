"""The tiny vision transformer shipped with the package, and others trained by the same tool."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cenote.backbones.base import Backbone, LayerReducer
from cenote.backbones.collect import collect
from cenote.backbones.fingerprint import weights_digest
from cenote.backbones.tiny_vit import TinyViT, TinyViTConfig
from cenote.files import write_all
from cenote.types import Features

SHIPPED = Path(__file__).with_name("embedded.safetensors")


class EmbeddedBackbone(Backbone):
    """A :class:`~cenote.backbones.tiny_vit.TinyViT` pretrained by masked autoencoding.

    The shipped one sees 8 x 8 grey images as 16 patches behind a class token, 64 channels wide, through 4 blocks, and
    was pretrained on the training part of scikit-learn's digits only. Hidden states 0 to ``depth - 1`` are the plain
    residual stream; the last one is taken after the final norm, as masked autoencoding trained it to be read.

    Args:
        path: a ``.safetensors`` file with a ``.json`` configuration beside it, or a folder holding
            ``embedded.safetensors``; ``None`` for the shipped one.
        device: where to run.
        dtype: of the weights; float32 unless given.

    Raises:
        ValueError: no such file, a configuration that does not describe a tiny vision transformer, or weights that do
            not fit it.
    """

    modality = "image"
    module: TinyViT

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.spec = "embedded" if path is None else f"embedded:{os.fspath(path)}"
        module = load_tiny_vit(SHIPPED if path is None else path)
        self.module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.config = module.config
        self.dim, self.num_layers = self.config.dim, self.config.depth
        self.prefix, self.grid = 1, self.config.grid

    def input_image(self, item: Image.Image) -> Image.Image:
        """The item as the network sees it: in the network's colours and size."""
        size = (self.config.image_size, self.config.image_size)
        image = item.convert("L" if self.config.channels == 1 else "RGB")
        return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)

    def collate(self, items: Sequence[Image.Image]) -> dict[str, Tensor]:
        """PIL images to ``{"pixel_values": (batch, channels, height, width)}``, scaled by its ``mean`` and ``std``."""
        return {"pixel_values": scale_images([self.input_image(item) for item in items], self.config)}

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        weight = self.module.class_token
        pixels = batch["pixel_values"].to(device=weight.device, dtype=weight.dtype)
        return collect(
            lambda: (self.module(pixels), None), self.module.blocks, layers, reduce, grid=self.grid, prefix=self.prefix
        )

    def transform_id(self) -> str:
        c = self.config
        return f"tiny-vit bilinear {c.image_size}px {c.channels}ch mean={c.mean} std={c.std}"

    def fingerprint(self) -> str:
        return weights_digest(self.module, asdict(self.config))


def scale_images(images: Sequence[Image.Image], config: TinyViTConfig) -> Tensor:
    """Images of one size to ``(batch, channels, height, width)``: pixels in [0, 1], less ``mean``, over ``std``."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.movedim(-1, 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.mean, config.std))
    return (pixels - mean) / std


def save_tiny_vit(module: TinyViT, path: str | os.PathLike[str]) -> None:
    """Write the weights to ``path`` (``.safetensors``) and the configuration beside them (``.json``)."""
    path = Path(path)
    config = json.dumps(asdict(module.config), indent=2) + "\n"
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    write_all(path.parent, {path.with_suffix(".json").name: config, path.name: save(state)})


def load_tiny_vit(path: str | os.PathLike[str]) -> TinyViT:
    """Read what :func:`save_tiny_vit` wrote."""
    path = Path(path)
    if path.is_dir():
        path = path / SHIPPED.name
    settings = path.with_suffix(".json")
    for needed in (path, settings):
        if not needed.is_file():
            raise ValueError(
                f"an embedded backbone is a .safetensors file with its .json beside it; there is no {needed}"
            )
    try:
        read: dict[str, Any] = json.loads(settings.read_text())
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in read.items()}
        module = TinyViT(TinyViTConfig(**fields))
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} and {settings.name} do not hold a tiny vision transformer: {error}") from error
    return module
