"""Cutting a sequence into chunks, and the decays inside one.

Inside a chunk the logarithms of the decays are summed from its start, ``c_i = g_1 + ... + g_i``; between two of its
tokens the decay is ``exp(c_i - c_j)``. Below and on the diagonal that exponent is at most 0; above, it is held at 0
before it is exponentiated and the result set to 0, so that nothing overflows.
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


def log_decay_sums(g: Float[Tensor, "rows chunks chunk *width"]) -> Float[Tensor, "rows chunks chunk *width"]:
    """``c``, with decays that forget everything (``-inf``) held where their exponential is just 0.

    A difference of two infinite sums would be NaN; held back, a sum still leaves room for the decays that follow.
    """
    return g.clamp(min=-120.0 if g.dtype == torch.float32 else -800.0).cumsum(dim=2)


def decay_between(c: Float[Tensor, "*rows chunk"]) -> Float[Tensor, "*rows chunk chunk"]:
    """``exp(c_i - c_j)`` for ``j <= i`` and 0 above the diagonal."""
    exponent = (c.unsqueeze(-1) - c.unsqueeze(-2)).clamp(max=0.0)
    return exponent.exp() * causal(c)


def causal(like: Float[Tensor, "*rows chunk"]) -> Float[Tensor, "chunk chunk"]:
    """1 for ``j <= i`` and 0 above the diagonal."""
    size = like.shape[-1]
    return torch.ones(size, size, dtype=like.dtype, device=like.device).tril()
