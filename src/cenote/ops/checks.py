"""What every module that takes tokens asks of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cenote.ops.masked import require_real_tokens


def check_tokens(kind: str, tokens: Any, mask: Any, dim: int, layers: bool = False) -> None:
    """Raise if tokens and mask are not what the module ``kind`` of width ``dim`` takes.

    Args:
        kind: name of the module, which the messages start with.
        tokens: ``(batch, tokens, dim)``, or ``(batch, layers, tokens, dim)`` with ``layers``.
        mask: ``(batch, tokens)`` boolean with ``True`` for a real token, or ``None``.

    Raises:
        TypeError: tokens that are not floating point, or a mask that is not boolean.
        ValueError: wrong rank, width or mask shape, no token, or a row without a real one.
    """
    rank, axes = (4, "(batch, layers, tokens, dim)") if layers else (3, "(batch, tokens, dim)")
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        raise TypeError(f"{kind} expects floating-point tokens, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
    if tokens.ndim != rank:
        raise ValueError(f"{kind} expects tokens {axes}, got shape {tuple(tokens.shape)}")
    if tokens.shape[-1] != dim:
        raise ValueError(f"{kind} was built for dim={dim}, got tokens of width {tokens.shape[-1]}")
    if tokens.shape[-2] == 0:
        raise ValueError(f"{kind} needs at least one token, got shape {tuple(tokens.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"{kind} expects a boolean mask (True = real token), got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    expected = (tokens.shape[0], tokens.shape[-2])
    if tuple(mask.shape) != expected:
        raise ValueError(f"{kind} expects a mask of shape {expected}, got {tuple(mask.shape)}")
    require_real_tokens(mask)
