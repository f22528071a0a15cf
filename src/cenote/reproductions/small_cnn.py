"""A small convolutional network whose pooling can be changed, trained at one input size or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.pooling.spp import SPP, training_sizes
from cenote.reproductions.fitting import Labelled

CHANNELS = 32


class SmallCNN(nn.Module):
    """Two convolutions, each halving the map, then a pooling and one linear layer.

    Args:
        pooling: ``spp`` (levels 4, 2, 1), ``max``, ``average``, or ``flatten``, which needs images of ``size`` pixels.
        size: side of the training images.
        classes: outputs.
    """

    def __init__(self, pooling: str, size: int, classes: int = 10) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.spp = SPP(CHANNELS, (4, 2, 1))
        widths = {"spp": self.spp.out_dim, "flatten": CHANNELS * (size // 2) ** 2}
        self.pooling, self.head = pooling, nn.Linear(widths.get(pooling, CHANNELS), classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.convolutions(images)
        pools: dict[str, Callable[[Tensor], Tensor]] = {
            "spp": self.spp.pool_maps,
            "max": lambda m: m.amax(dim=(2, 3)),
            "average": lambda m: m.mean(dim=(2, 3)),
            "flatten": lambda m: m.flatten(1),
        }
        return self.head(pools[self.pooling](maps))


def resize(images: Tensor, size: int) -> Tensor:
    """Square images ``(batch, 1, side, side)`` resampled to ``size`` pixels a side."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def train_cnn(
    train: Labelled, pooling: str, sizes: Sequence[int], seed: int, epochs: int, lr: float = 3e-3
) -> SmallCNN:
    """Train with AdamW, batches of 64 and a cosine; each epoch at one of ``sizes``, in turn, as SPP-net does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(pooling, sizes[0])
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
        steps = epochs * -(-len(train.targets) // 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for size in training_sizes(epochs, sizes):
            images = resize(train.tokens, size)
            for index in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(model(images[index]), train.targets[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: SmallCNN, test: Labelled, size: int) -> float:
    """Per cent right on the test images resampled to ``size``."""
    images = resize(test.tokens, size)
    outputs = torch.cat([model(batch) for batch in images.split(512)])
    return 100 * (outputs.argmax(dim=1) == test.targets).double().mean().item()


def fashion(path: str, train: int, test: int) -> tuple[Labelled, Labelled]:
    """The first images of each part of Fashion-MNIST from an ``.npz`` file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in ("train_x", "train_y", "test_x", "test_y")}

    def part(name: str, count: int) -> Labelled:
        images = torch.from_numpy(arrays[f"{name}_x"][:count]).float().unsqueeze(1) / 255
        return Labelled((images - 0.286) / 0.353, torch.from_numpy(arrays[f"{name}_y"][:count]).long())

    return part("train", train), part("test", test)
