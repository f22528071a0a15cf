"""Sequences padded on either side, moved so that the real tokens stand in front."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def front_order(kind: str, mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """The order that puts real tokens in front of padding, for :func:`reorder`.

    Raises:
        ValueError: padding between real tokens (looked at outside torch.compile only).
    """
    if not torch.compiler.is_compiling():
        starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
        if bool((starts > 1).any()):
            rows = (starts > 1).nonzero().flatten().tolist()
            raise ValueError(f"{kind} takes padding on the left or right, but row(s) {rows[:10]} have it in between")
    return (~mask).byte().argsort(dim=1, stable=True)


def reorder(x: Float[Tensor, "batch tokens dim"], order: Int[Tensor, "batch tokens"]) -> Tensor:
    """The tokens in that order."""
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def restore(x: Float[Tensor, "batch tokens dim"], order: Int[Tensor, "batch tokens"]) -> Tensor:
    """The way back from :func:`reorder`."""
    return torch.zeros_like(x).scatter(1, order.unsqueeze(-1).expand_as(x), x)


def check_right_padding(kind: str, mask: Tensor, tokens: int) -> None:
    """Raise ``ValueError`` if a mask is not ``(batch, tokens)`` or real tokens follow padding (outside compile)."""
    if mask.ndim != 2 or mask.shape[1] != tokens:
        raise ValueError(f"{kind} expects a mask (batch, {tokens}), got {tuple(mask.shape)}")
    if not torch.compiler.is_compiling() and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(f"{kind} takes padding on the right only: move it there, as the layer around it does")
