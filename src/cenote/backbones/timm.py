"""Vision networks of the timm library."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cenote.backbones.base import Backbone, LayerReducer
from cenote.backbones.collect import Collector, collect
from cenote.backbones.fingerprint import weights_digest
from cenote.backbones.hooks import find_blocks
from cenote.types import Features, Grid


class TimmBackbone(Backbone):
    """Vision transformers with prefix tokens, and the last maps of convolutional networks as grids of tokens.

    Of a transformer, hidden states 0 to ``num_layers - 1`` are the residual stream and the last one is what
    ``forward_features`` returns (after the final norm where the network normalises before pooling). A convolutional
    network's stages differ in width, so only its last map can be had. ``pooled`` is the network's own
    ``forward_head(..., pre_logits=True)``: class token, average or attention pooling, as it was trained.

    Args:
        name: a timm model, ``"vit_small_patch14_dinov2.lvd142m"``, say, or ``"hf-hub:ID"``.
        device: where to run.
        dtype: of the weights; float32 unless given.
        image_size: side, or (height, width), in place of the size that the network was trained at.
        pretrained: ``False`` leaves the weights random, for tests of shapes.
        options: further keywords of ``timm.create_model``.

    Raises:
        ValueError: unknown name (nearest names suggested) or a network that gives neither tokens nor a map.
        ImportError: timm is missing.
    """

    modality = "image"
    module: Any  # timm adds methods that torch.nn.Module does not declare

    def __init__(
        self,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        image_size: int | tuple[int, int] | None = None,
        pretrained: bool = True,
        **options: Any,
    ) -> None:
        timm = _timm()
        self.spec, self.name = f"timm:{name}", name
        if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
            near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_models(pretrained=True)], n=3)
            raise ValueError(
                f"timm has no model {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
            )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        if size is not None and hasattr(module, "set_input_size"):
            module.set_input_size(img_size=size)
        self.module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.settings = timm.data.resolve_model_data_config(module)
        if size is not None:
            self.settings |= {"input_size": (self.settings["input_size"][0], *size), "crop_pct": 1.0}
        self.transform = timm.data.create_transform(**self.settings, is_training=False)
        self.prefix = getattr(module, "num_prefix_tokens", 0)
        self.dim = module.num_features
        self.widths: tuple[int, ...] = ()
        self.blocks = None
        sample = self._forward(self.collate([Image.new("RGB", (64, 64))])["pixel_values"])
        if sample.ndim == 3:
            self.blocks = find_blocks(module) if not hasattr(module, "blocks") else module.blocks
            self.num_layers = len(self.blocks)
        elif sample.ndim == 4:
            self.widths = tuple(stage["num_chs"] for stage in module.feature_info)
            self.num_layers = len(self.widths)
        else:
            raise ValueError(f"{self.spec} gives features of shape {tuple(sample.shape)}: neither tokens nor a map")
        self.grid = self._grid(sample, self.settings["input_size"][-2:])
        self.pooled_dim = self._pool(sample).shape[-1]
        self._digest: str | None = None

    def collate(self, items: Sequence[Image.Image]) -> dict[str, Tensor]:
        """PIL images through the transform that timm keeps with the network."""
        return {"pixel_values": torch.stack([self.transform(item.convert("RGB")) for item in items])}

    def encode(self, batch: dict[str, Tensor], layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        pixels = batch["pixel_values"]
        if self.blocks is None:
            return self._encode_map(pixels, layers, reduce)

        def run() -> tuple[Tensor, Tensor]:
            last = self._forward(pixels)
            return last, self._pool(last)

        features = collect(run, self.blocks, layers, reduce, prefix=self.prefix)
        if reduce is not None:
            return features
        grid = self._grid(features.hidden[:, -1], tuple(pixels.shape[-2:]))
        return Features(features.hidden, features.mask, layers, grid, self.prefix, features.pooled)

    def _encode_map(self, pixels: Tensor, layers: tuple[int, ...], reduce: LayerReducer | None) -> Features:
        if set(layers) != {self.num_layers}:
            raise ValueError(
                f"the stages of {self.spec} have different widths {self.widths}, so they cannot be stacked as layers: "
                f"only the last map can be had (layers='last', which is {self.num_layers}), got {layers}"
            )
        last = self._forward(pixels)
        channels_last = self._channels_last()
        tokens = last.flatten(1, 2) if channels_last else last.flatten(2).transpose(1, 2)
        collector = Collector(layers, None, reduce)
        collector(self.num_layers, tokens)
        return collector.features(self._grid(last, tuple(pixels.shape[-2:])), 0, self._pool(last))

    def _forward(self, pixels: Tensor) -> Tensor:
        weight = next(self.module.parameters())
        with torch.inference_mode():
            return self.module.forward_features(pixels.to(device=weight.device, dtype=weight.dtype))

    def _pool(self, features: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.module.forward_head(features, pre_logits=True)

    def _channels_last(self) -> bool:
        return str(getattr(self.module, "output_fmt", "NCHW")).endswith("NHWC")

    def _grid(self, features: Tensor, size: tuple[int, ...]) -> Grid | None:
        """Rows and columns behind the prefix, from the map itself or from image and patch size."""
        if features.ndim == 4:
            height, width = features.shape[1:3] if self._channels_last() else features.shape[2:]
            return Grid(height, width)
        embed = getattr(self.module, "patch_embed", None)
        patch = getattr(embed, "patch_size", None)
        if patch is None:
            return None
        grid = Grid(size[0] // patch[0], size[1] // patch[1])
        return grid if grid.height * grid.width == features.shape[1] - self.prefix else None

    def input_image(self, item: Image.Image) -> Image.Image:
        """The item as the network sees it, after resizing and cropping, with the normalisation undone."""
        pixels = self.collate([item])["pixel_values"][0]
        mean, std = (torch.tensor(self.settings[key]).view(-1, 1, 1) for key in ("mean", "std"))
        pixels = (pixels * std + mean).clamp(0, 1)
        return Image.fromarray((pixels * 255).round().byte().movedim(0, -1).numpy())

    def transform_id(self) -> str:
        return "timm " + " ".join(f"{key}={self.settings[key]}" for key in sorted(self.settings))

    def fingerprint(self) -> str:
        if self._digest is None:
            self._digest = weights_digest(self.module, {"name": self.name})
        return self._digest


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ImportError("timm backbones need timm: pip install 'cenote[vision]'") from error
    return timm
