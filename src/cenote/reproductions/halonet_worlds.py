"""Small residual networks with halo blocks or 3 x 3 convolutions, and the task of two dots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.mixing.halonet import ConvNorm, HaloBlock, HaloBottleneck
from cenote.reproductions.fitting import Labelled

SIDE, BLOCK = 12, 4


class SmallResidual(nn.Module):
    """One convolution, bottleneck blocks, mean over cells, linear classifier.

    Args:
        blocks: settings; each block's input is the output of the one before.
        kernel: of the first convolution; 1 leaves all context to the blocks.
        stride: of the first convolution.
        width: of its output.
        classes: outputs.
    """

    def __init__(
        self, blocks: list[HaloBlock], kernel: int = 3, stride: int = 1, width: int = 32, classes: int = 10
    ) -> None:
        super().__init__()
        widths = [width, *(block.out for block in blocks)]
        self.stem = ConvNorm(1, width, kernel, stride, act="relu")
        self.blocks = nn.Sequential(*(HaloBottleneck(w, block) for w, block in zip(widths, blocks, strict=False)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def count(model: nn.Module) -> int:
    """Numbers to learn."""
    return sum(parameter.numel() for parameter in model.parameters())


def halo_classifier(block: int, halo: int, stem_stride: int) -> SmallResidual:
    """Two stages of two attention blocks, the second at half the size."""
    attention = {"num_heads": 2, "block_size": block, "halo_size": halo}
    blocks = [
        HaloBlock("attention", inner, out, stride, attention=attention)
        for inner, out, stride in ((32, 48, 1), (32, 48, 1), (48, 64, 2), (48, 64, 1))
    ]
    return SmallResidual(blocks, stride=stem_stride)


def conv_classifier(parameters: int, stem_stride: int) -> SmallResidual:
    """The same with 3 x 3 convolutions, all inner widths scaled alike until the parameters are as near as can be."""

    def made(inner: int) -> SmallResidual:
        blocks = [
            HaloBlock("convolution", width, out, stride)
            for width, out, stride in (
                (inner, 48, 1), (inner, 48, 1), (inner * 3 // 2, 64, 2), (inner * 3 // 2, 64, 1),
            )
        ]  # fmt: skip
        return SmallResidual(blocks, stride=stem_stride)

    with torch.device("meta"):
        best = min(range(4, 65), key=lambda inner: abs(count(made(inner)) - parameters))
    return made(best)


def fit(model: nn.Module, train: Labelled, steps: int, batch: int, lr: float = 3e-3) -> nn.Module:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine to 0, cross-entropy."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(train.targets))
        index, order = order[:batch], order[batch:]
        loss = F.cross_entropy(model(train.tokens[index]), train.targets[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def per_cent_right(model: nn.Module, test: Labelled) -> float:
    """Accuracy."""
    outputs = torch.cat([model(part) for part in test.tokens.split(250)])
    return 100 * (outputs.argmax(dim=1) == test.targets).double().mean().item()


def two_dots(items: int, seed: int) -> tuple[Labelled, Tensor]:
    """Images of 12 x 12 with two dots, and whether the dots lie in different blocks of 4 x 4.

    The dots lie in one block or in two that share a side, equally often; the class is 1 where their distance is 1, and
    0 where rows and columns together differ by 2 to 4, equally often in both.
    """
    place = torch.arange(SIDE * SIDE)
    row, column = place // SIDE, place % SIDE
    apart = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    blocks = (row[:, None] // BLOCK - row // BLOCK).abs() + (column[:, None] // BLOCK - column // BLOCK).abs()
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (items,), generator=generator)
    across = torch.randint(2, (items,), generator=generator).bool()
    images = torch.zeros(items, SIDE * SIDE)
    for target in (0, 1):
        distance = apart == 1 if target else (apart >= 2) & (apart <= 4)
        for over in (False, True):
            pairs = (distance & (blocks == int(over))).nonzero()
            which = ((targets == target) & (across == over)).nonzero()
            drawn = pairs[torch.randint(len(pairs), (len(which),), generator=generator)]
            images[which, drawn] = 1.0
    return Labelled(images.view(items, 1, SIDE, SIDE), targets), across


def dots_network(halo: int) -> SmallResidual:
    """One attention block behind a convolution of 1 x 1: context comes through the attention alone."""
    attention = {"num_heads": 2, "block_size": BLOCK, "halo_size": halo}
    return SmallResidual([HaloBlock("attention", 32, 32, attention=attention)], kernel=1, classes=2)
