"""Features and labels as they come in: checked, widened, in batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cenote.ops.masked import widen

CHUNK = 8192
"""Items taken at a time from a tensor: their logits are all that grows with the number of classes."""

Batches = Iterable[tuple[Tensor, Tensor]]


def as_batches(features: Tensor | Batches, labels: Tensor | None) -> Batches:
    """Two tensors cut into batches; an iterable of batches as it is."""
    if not isinstance(features, Tensor):
        return features
    if labels is None or len(labels) != len(features):
        raise ValueError(
            f"{len(features)} training items need as many labels, got {None if labels is None else len(labels)}"
        )
    return list(zip(features.split(CHUNK), labels.split(CHUNK), strict=True))


def checked_features(features: Tensor, dim: int, device: torch.device) -> Tensor:
    """In float32 or better, on the device; ``ValueError`` for another width or values that are not finite."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must be (items, {dim}), the width of W, got {tuple(features.shape)}")
    features = widen(features.detach()).to(device)
    if not features.sum().isfinite():  # one cheap pass; a sum that merely overflows is sorted out here
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(f"features are not finite in item(s) {(~finite).nonzero().flatten().tolist()[:10]}")
    return features


def checked_labels(labels: Tensor, items: int, classes: int, device: torch.device) -> Tensor:
    """As int64, on the device; ``TypeError`` or ``ValueError`` for what is no class of one of the items."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != (items,):
        raise ValueError(f"{items} training items need as many labels, got {tuple(labels.shape)}")
    if items and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return labels.long().to(device)
