"""Cutting a sequence into chunks, and the decays inside one.

Inside a chunk the logarithms of the decays are summed from its start, ``c_i = g_1 + ... + g_i``; between two of its
tokens the decay is ``exp(c_i - c_j)``. Below and on the diagonal that exponent is at most 0; above, it is set to
``-inf`` before it is exponentiated, so that nothing overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK = 32
"""The fastest on CPUs: a shorter chunk has less to do inside it, a longer one fewer steps of the loop."""


def cut(x: Tensor, chunk: int) -> Tensor:
    """``(batch, heads, tokens, ...)`` to ``(batch * heads, chunks, chunk, ...)``, the last chunk filled with zeros."""
    missing = -x.shape[2] % chunk
    if missing:
        x = F.pad(x, (*(0, 0) * (x.ndim - 3), 0, missing))
    return x.reshape(x.shape[0] * x.shape[1], -1, chunk, *x.shape[3:])


def join(x: Tensor, batch: int, tokens: int) -> Tensor:
    """The way back from :func:`cut`, without the filling."""
    return x.reshape(batch, x.shape[0] // batch, -1, x.shape[-1])[:, :, :tokens]


def chunk_length(tokens: int, chunk_size: int | None, multiple: int = 1) -> int:
    """The chunk that is used for so many tokens: not longer than they are, rounded up to ``multiple``.

    Raises:
        ValueError: a chunk size below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for one chunk, got {chunk_size}")
    whole = tokens + -tokens % multiple
    return whole if chunk_size is None else min(chunk_size, whole)


def decays(
    g: Float[Tensor, "rows chunks chunk *width"],
) -> tuple[Float[Tensor, "rows chunks chunk chunk *width"], Float[Tensor, "rows chunks chunk *width"]]:
    """Decay from token j to token i, ``exp(c_i - c_j)`` for ``j <= i`` and 0 above; and from the start, ``exp(c_i)``.

    The sums are float64: after strong decays a small difference of large float32 sums is wrong in the fourth digit.
    Decays that forget everything (``-inf``) are held where their exponential is just 0, since a difference of two
    infinite sums would be NaN.
    """
    held = g.clamp(min=-120.0 if g.dtype == torch.float32 else -800.0)
    c = (held if g.device.type == "mps" else held.double()).cumsum(dim=2)  # MPS has no float64
    exponent = (c.unsqueeze(3) - c.unsqueeze(2)).to(g.dtype)
    size = g.shape[2]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    return exponent.masked_fill(later.view(size, size, *(1,) * (g.ndim - 3)), -torch.inf).exp(), c.exp().to(g.dtype)


def causal(like: Float[Tensor, "*rows chunk"]) -> Float[Tensor, "chunk chunk"]:
    """1 for ``j <= i`` and 0 above the diagonal."""
    size = like.shape[-1]
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril()
