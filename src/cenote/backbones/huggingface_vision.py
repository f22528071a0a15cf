"""Vision transformers of the transformers library."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cenote.backbones.base import LayerReducer
from cenote.backbones.collect import collect
from cenote.backbones.hooks import find_blocks
from cenote.backbones.huggingface import HuggingFaceBackbone, Loaded
from cenote.types import Features, Grid


class HuggingFaceVision(HuggingFaceBackbone):
    """ViT, DeiT, MAE (nothing masked), DINOv2, DINOv3 ViT, BEiT, and the vision towers of CLIP and SigLIP.

    ``prefix`` is what stands in front of the patches: class token, distillation token, registers; none for SigLIP.
    ``pooled`` is the network's ``pooler_output`` where the checkpoint has the weights for it: the normalised class
    token (CLIP, before its projection), an attention pooling (SigLIP), a dense layer (ViT), a normalised mean (BEiT).

    Args:
        loaded: the network.
        image_size: side, or (height, width), to resize to in place of what the checkpoint's processor does (no crop
            then); positions are interpolated where the network can.

    Raises:
        ValueError: the repository has no image processor, or the network is not one of patches on a grid.
    """

    modality = "image"

    def __init__(self, loaded: Loaded, image_size: int | tuple[int, int] | None = None) -> None:
        super().__init__(loaded)
        self.blocks = find_blocks(self.module, self.num_layers)
        self.processor = _image_processor(loaded)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = loaded.config.patch_size
        self.patch_size: tuple[int, int] = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self._accepts = set(inspect.signature(self.module.forward).parameters)
        if hasattr(loaded.config, "mask_ratio"):
            loaded.config.mask_ratio = 0.0  # MAE's encoder would drop patches at inference too
        # One grey image through the network says what no configuration says in the same words for every class.
        sample = self(self.collate([Image.new("RGB", (64, 64), (128, 128, 128))]))
        self.prefix, self.grid = sample.prefix, sample.grid
        self.pooled_dim = None if sample.pooled is None else sample.pooled.shape[-1]

    def collate(self, items: Sequence[Image.Image]) -> dict[str, Tensor]:
        """PIL images through the checkpoint's own processor."""
        resized = {}
        if self.image_size is not None:
            height, width = self.image_size
            resized = {"size": {"height": height, "width": width}, "do_center_crop": False}
        batch = dict(self.processor([item.convert("RGB") for item in items], return_tensors="pt", **resized))
        if "spatial_shapes" in batch:
            # Variable resolution: what is padded beyond the largest image of the batch says nothing.
            longest = int(batch["spatial_shapes"].prod(dim=1).max())
            batch["pixel_values"] = batch["pixel_values"][:, :longest]
            batch["pixel_attention_mask"] = batch["pixel_attention_mask"][:, :longest]
        return batch

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        weight = next(self.module.parameters())
        inputs: dict[str, Any] = {name: tensor.to(weight.device) for name, tensor in batch.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(weight.dtype)
        grid, mask = self._grid(inputs)
        patches = 0 if grid is None else grid.height * grid.width
        if "noise" in self._accepts:
            # MAE keeps patches in the order of their noise: a rising one leaves them where they are.
            inputs["noise"] = torch.arange(patches, device=weight.device).float().expand(len(batch["pixel_values"]), -1)
        if "interpolate_pos_encoding" in self._accepts:
            inputs["interpolate_pos_encoding"] = self._resized(inputs["pixel_values"])

        def run() -> tuple[Tensor, Tensor | None]:
            out = self.module(**inputs)
            return out.last_hidden_state, None if self._pooler_is_random() else getattr(out, "pooler_output", None)

        features = collect(run, self.blocks, layers, reduce, mask)
        if reduce is not None:
            return features
        tokens = features.hidden.shape[2]
        prefix = 0 if grid is None else tokens - patches
        if prefix < 0:
            raise ValueError(
                f"{self.spec} gives {tokens} tokens for {patches} patches: only networks with one token a patch will do"
            )
        return Features(features.hidden, features.mask, layers, grid, prefix, features.pooled)

    def _grid(self, inputs: dict[str, Tensor]) -> tuple[Grid | None, Tensor | None]:
        """The patch grid common to the batch, and the mask of real patches where there is padding."""
        if "spatial_shapes" not in inputs:
            height, width = inputs["pixel_values"].shape[-2:]
            return Grid(height // self.patch_size[0], width // self.patch_size[1]), None
        shapes = inputs["spatial_shapes"]
        mask = inputs["pixel_attention_mask"].bool()
        same = bool((shapes == shapes[0]).all())
        return (Grid(*shapes[0].tolist()) if same else None), mask

    def _resized(self, pixels: Tensor) -> bool:
        """Whether the input differs from the size that the network has positions for."""
        size = self.loaded.config.image_size
        return tuple(pixels.shape[-2:]) != ((size, size) if isinstance(size, int) else tuple(size))

    def _pooler_is_random(self) -> bool:
        return self.loaded.lacks("pooler") or self.loaded.lacks("head.")

    def input_image(self, item: Image.Image) -> Image.Image:
        """The item as the network sees it, after resizing and cropping, with the normalisation undone."""
        batch = self.collate([item])
        if "spatial_shapes" in batch:
            height, width = batch["spatial_shapes"][0].tolist()
            return item.convert("RGB").resize((width * self.patch_size[1], height * self.patch_size[0]))
        pixels = batch["pixel_values"][0].float()
        if getattr(self.processor, "do_normalize", False):
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.processor.image_mean, self.processor.image_std))
            pixels = pixels * std + mean
        return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())

    def transform_id(self) -> str:
        settings = {key: value for key, value in self.processor.to_dict().items() if not key.startswith("_")}
        return json.dumps({"image_size": self.image_size, **settings}, sort_keys=True, default=str)


def _image_processor(loaded: Loaded) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(loaded.name, **loaded.source)
    except ImportError as error:
        raise ImportError("image processors need torchvision: pip install 'cenote[vision]'") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{loaded.name!r} has no image processor beside the weights (preprocessor_config.json)"
        ) from error
