"""Masked autoencoding of a :class:`~cenote.backbones.tiny_vit.TinyViT`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.backbones.tiny_vit import Block, TinyViT, TinyViTConfig, sincos_positions, to_patches


@dataclass(frozen=True)
class PretrainSettings:
    """How :func:`pretrain` trains.

    Attributes:
        epochs: passes over the images.
        mask_ratio: share of the patches hidden from the encoder.
        batch_size: images a step.
        lr: peak learning rate of AdamW (betas 0.9, 0.95), reached after ``warmup`` of the steps, then a cosine to zero.
        weight_decay: of matrices; vectors are not decayed.
        decoder_dim, decoder_depth: width and blocks of the decoder, which is thrown away.
        norm_targets: predict each patch with its own mean and deviation removed. Off, because in patches of a few
            pixels the mean is most of what there is to predict.
        flip: mirror half of the images (photographs yes, digits no).
        seed: of weights, order and masks.
    """

    epochs: int = 60
    mask_ratio: float = 0.6
    batch_size: int = 256
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    decoder_dim: int = 64
    decoder_depth: int = 1
    norm_targets: bool = False
    flip: bool = False
    seed: int = 0


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches, fill the gaps with one learned token, decode, and predict the hidden pixels.

    ``loss = mean over hidden patches of |decoder(visible) - pixels|^2``. He et al. (arXiv 2111.06377).
    """

    positions: Tensor

    def __init__(self, encoder: TinyViT, settings: PretrainSettings) -> None:
        super().__init__()
        config, dim = encoder.config, settings.decoder_dim
        self.encoder, self.settings = encoder, settings
        self.bridge = nn.Linear(config.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.blocks = nn.Sequential(
            *(Block(dim, config.heads, config.mlp_ratio) for _ in range(settings.decoder_depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, config.channels * config.patch_size**2)
        self.register_buffer("positions", sincos_positions(config.grid, dim), persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], noise: Float[Tensor, "batch patches"]
    ) -> Tensor:
        """The loss; the patches with the smallest ``noise`` stay visible."""
        patches = self.encoder.embed(images)
        batch, count, _ = patches.shape
        visible = count - round(count * self.settings.mask_ratio)
        order = noise.argsort(dim=1)
        seen, hidden = order[:, :visible], order[:, visible:]
        encoded = self.bridge(self.encoder.encode(_gather(patches, seen)))
        filled = self.mask_token.expand(batch, count, -1)
        filled = filled.scatter(1, seen.unsqueeze(-1).expand(-1, -1, filled.shape[-1]), encoded[:, 1:].to(filled.dtype))
        decoded = self.norm(self.blocks(torch.cat([encoded[:, :1], filled + self.positions], dim=1)))[:, 1:]
        targets = to_patches(images, self.encoder.config.patch_size)
        if self.settings.norm_targets:
            targets = (targets - targets.mean(-1, keepdim=True)) / (targets.var(-1, keepdim=True) + 1e-6).sqrt()
        return (self.predict(_gather(decoded, hidden)) - _gather(targets, hidden)).square().mean()


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def pretrain(
    images: Float[Tensor, "images channels height width"],
    config: TinyViTConfig,
    settings: PretrainSettings | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    device: torch.device | str = "cpu",
) -> TinyViT:
    """Train a tiny vision transformer by masked autoencoding.

    Args:
        images: already scaled by the configuration's ``mean`` and ``std``.
        config: shape of the encoder.
        settings: how to train.
        on_epoch: called with the epoch's number (from 1) and its mean loss.
        device: where to train.

    Returns:
        The encoder in eval mode, on the CPU.
    """
    settings = settings or PretrainSettings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = MaskedAutoencoder(TinyViT(config), settings).to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    steps = settings.epochs * math.ceil(len(images) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(steps, settings.warmup))
    patches = config.grid.height * config.grid.width
    images = images.to(device)
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        for index in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            batch = images[index.to(device)]
            if settings.flip:
                mirrored = (torch.rand(len(index), generator=generator) < 0.5).to(device)
                batch = torch.where(mirrored.view(-1, 1, 1, 1), batch.flip(-1), batch)
            loss = model(batch, torch.rand(len(index), patches, generator=generator).to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(index)
        if on_epoch is not None:
            on_epoch(epoch, total / len(images))
    return model.encoder.cpu().eval().requires_grad_(False)


def _warm_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    warm = max(1, int(steps * warmup))
    return lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))))
