"""Tiny vision transformers on scikit-learn's digits, and the tokens they give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.backbones.embedded import EmbeddedBackbone, scale_images
from cenote.backbones.masked_autoencoder import PretrainSettings, pretrain
from cenote.backbones.tiny_vit import TinyViT, TinyViTConfig
from cenote.data import load_data
from cenote.reproductions.fitting import Labelled, Parts


def digits(config: TinyViTConfig) -> Parts:
    """Images in place of tokens: 1080 for training, 120 for validation, 597 for the test."""
    data = load_data("digits")
    parts = (data.train, data.validation, data.test)
    return Parts(*(Labelled(scale_images([s.items[i] for i in range(len(s))], config), s.targets) for s in parts))


@torch.inference_mode()
def encode(encoder: TinyViT, images: Parts) -> Parts:
    """Tokens of the last block, class token first."""
    return images.read(lambda pixels: torch.cat([encoder(batch) for batch in pixels.split(512)])).read(Tensor.clone)


def embedded() -> TinyViT:
    """The encoder that ships with the package."""
    return EmbeddedBackbone().module


def masked_autoencoder(images: Parts, config: TinyViTConfig, settings: PretrainSettings) -> TinyViT:
    """Pretrained on all images but the test part's; labels are not used."""
    return pretrain(torch.cat([images.train.tokens, images.validation.tokens]), config, settings)


def supervised(images: Parts, config: TinyViTConfig, seed: int, epochs: int = 30, lr: float = 1e-3) -> TinyViT:
    """The same encoder trained on the labels of the training part through the mean of its patch tokens.

    AdamW, weight decay 0.05, batches of 64, one tenth of warm-up, then a cosine: ordinary settings, not tuned.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, head = TinyViT(config), nn.Linear(config.dim, 10)
        generator = torch.Generator().manual_seed(seed)
        pixels, targets = images.train
        model = nn.ModuleList([encoder, head])
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
        steps = epochs * -(-len(targets) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, steps, pct_start=0.1)
        for _ in range(epochs):
            for index in torch.randperm(len(targets), generator=generator).split(64):
                loss = F.cross_entropy(head(encoder(pixels[index])[:, 1:].mean(dim=1)), targets[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return encoder.eval().requires_grad_(False)


PATCHES: Callable[[Tensor], Tensor] = lambda tokens: tokens[:, 1:]  # noqa: E731
