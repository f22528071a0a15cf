"""Small MetaFormers trained on scikit-learn's digits, each with one part of the block changed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.mixing.poolformer import StagedMetaFormer

VARIANTS: dict[str, dict[str, Any]] = {
    "pooling": {},
    "identity": {"mixers": "identity"},
    "random matrix": {"mixers": "random_matrix(grid=(4, 4))"},
    "attention": {"mixers": "softmax_attention(num_heads=2)"},
    "no residual": {"residual": False},
    "no MLP": {"feed_forward": "none"},
    "no residual, no LayerScale": {"residual": False, "layer_scale": None},
}
"""Settings of :class:`cenote.mixing.poolformer.StagedMetaFormer` beside the common ones, by variant."""


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images ``(items, 1, 8, 8)`` and classes of the training and the test part."""
    from sklearn.datasets import load_digits

    from cenote.data.digits import digits_source

    bunch = load_digits()
    images, targets = torch.from_numpy(bunch.images).float().unsqueeze(1), torch.from_numpy(bunch.target).long()
    test = torch.tensor([part == "test" for part in digits_source().parts or ()])
    mean, deviation = images[~test].mean(), images[~test].std()
    images = (images - mean) / deviation
    return (images[~test], targets[~test]), (images[test], targets[test])


def digit_accuracy(variant: str, seed: int, steps: int = 500, batch: int = 64, rate: float = 1e-2) -> float:
    """Per cent right on the test images after ``steps`` of AdamW with the published start and weight decay."""
    (images, targets), (test, answers) = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        common: dict[str, Any] = {"in_channels": 1, "stem": (2, 2, 0), "num_classes": 10}
        model = StagedMetaFormer((4,), (32,), **{**common, **VARIANTS[variant]})
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
        for _ in range(steps):
            index = torch.randint(len(images), (batch,))
            loss = F.cross_entropy(model(images[index]), targets[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return 100 * (model.eval()(test).argmax(dim=1) == answers).double().mean().item()
