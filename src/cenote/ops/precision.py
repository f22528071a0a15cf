"""Arithmetic that autocast must not narrow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast narrows products on the device of ``x`` to; ``None`` where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if is_autocast_available(kind) and torch.is_autocast_enabled(kind) else None


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A block in which products of float32 tensors on the device of ``x`` stay float32, under autocast too."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()
