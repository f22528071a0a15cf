"""Channels as heads."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def num_heads_of(dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """Number of heads, given as such or by their width.

    Raises:
        ValueError: heads that do not divide the width.
    """
    heads = num_heads if head_dim is None else dim // max(head_dim, 1)
    if heads < 1 or dim % heads or (head_dim is not None and dim != heads * head_dim):
        raise ValueError(f"dim={dim} is not divisible into heads (num_heads={num_heads}, head_dim={head_dim})")
    return heads


def heads_of(x: Float[Tensor, "batch tokens dim"], num_heads: int) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Consecutive channels of each token as heads."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "batch tokens dim"]:
    """The inverse of :func:`heads_of`."""
    return x.transpose(1, 2).flatten(2)
