"""Linear recurrences with decay: ``S = a S + k v^T``, ``o = scale S^T q``.

The decay is 1 (linear attention), one number a head and token (RetNet, Mamba-2, simple GLA) or one for each key
feature (GLA, RWKV-6, HGRN-2), given by its logarithm ``g``; the gate of a token multiplies what was there before it.
The state ``S`` is ``(batch, heads, key_dim, value_dim)``. One chunk that holds everything
(``chunk_size=None``) is the parallel form ``((Q K^T) * D) V``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cenote.ops.chunks import CHUNK, causal, chunk_length, cut, decays, join

FEATURE_CHUNK = 16


def retention_log_decay(num_heads: int) -> Float[Tensor, "heads"]:
    """RetNet's constant decay of each head, ``log(1 - 2^(-5 - h))``, in float64."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64)))


def elu_features(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive, so that sums of products of queries and keys cannot vanish."""
    # Not torch's own, whose gradient torch.compile gives other strides than it has, so that it fails behind heads.
    return torch.where(x > 0, x + 1, x.clamp(max=0.0).exp())


def chunk_linear(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    g: Float[Tensor, "batch heads tokens"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    chunk_size: int | None = CHUNK,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Outputs of a stretch of tokens and the state after it, with no decay or one for each head.

    ``O = (e^c Q) S + ((Q K^T) * D) V``; ``S = e^(c_C) S + (e^(c_C - c) K)^T V``.

    Raises:
        ValueError: a chunk size below 1.
    """
    batch, heads, tokens, _ = query.shape
    size = chunk_length(tokens, chunk_size)
    query, key, value = (cut(x, size) for x in (query * scale, key, value))
    scores = query @ key.transpose(-1, -2)
    if g is None:
        scores, kept = scores * causal(scores[..., 0]), None
    else:
        between, fading = decays(cut(g, size))
        fading = fading.unsqueeze(-1)
        scores, query, key = scores * between, query * fading, key * between[:, :, -1].unsqueeze(-1)
        kept = fading[:, :, -1:]
    before, now = scan(key.transpose(-1, -2) @ value, kept, state)
    return join(query @ before + scores @ value, batch, tokens), now.unflatten(0, (batch, heads))


def chunk_feature_decay(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    g: Float[Tensor, "batch heads tokens key_dim"],
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    chunk_size: int | None = FEATURE_CHUNK,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """The same with a decay for each key feature: ``S = diag(exp(g)) S + k v^T``.

    Inside a chunk the decay does not leave the sum over features: ``sum_f q_if k_jf exp(c_if - c_jf)`` is taken as it
    stands, which holds ``chunk_size`` numbers for each token and feature but never an exponent above 0. Chunks are
    therefore short.

    Raises:
        ValueError: a chunk size below 1.
    """
    batch, heads, tokens, _ = query.shape
    size = chunk_length(tokens, chunk_size)
    query, key, value = (cut(x, size) for x in (query * scale, key, value))
    between, fading = decays(cut(g, size))
    scores = ((between * key.unsqueeze(2)) @ query.unsqueeze(-1)).squeeze(-1)  # (rows, chunks, queries, keys)
    writes = (key * between[:, :, -1]).transpose(-1, -2) @ value
    before, now = scan(writes, fading[:, :, -1].unsqueeze(-1), state)
    return join((query * fading) @ before + scores @ value, batch, tokens), now.unflatten(0, (batch, heads))


def step_linear(
    query: Float[Tensor, "batch heads 1 key_dim"],
    key: Float[Tensor, "batch heads 1 key_dim"],
    value: Float[Tensor, "batch heads 1 value_dim"],
    g: Float[Tensor, "batch heads 1 *key_dim"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"],
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """One token by the definition, for decays of either kind."""
    if g is not None:
        state = (g.transpose(-1, -2) if g.ndim == 4 else g.unsqueeze(-1)).exp() * state
    state = state + key.transpose(-1, -2) @ value
    return scale * query @ state, state


def scan(
    writes: Float[Tensor, "rows chunks key_dim value_dim"],
    kept: Float[Tensor, "rows chunks features 1"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None,
) -> tuple[Float[Tensor, "rows chunks key_dim value_dim"], Float[Tensor, "rows key_dim value_dim"]]:
    """The state before each chunk and the one after the last, where a chunk keeps ``kept`` of it and adds its own."""
    now = torch.zeros_like(writes[:, 0]) if state is None else state.flatten(0, 1)
    before = []
    decays = [None] * writes.shape[1] if kept is None else kept.unbind(1)
    for write, decay in zip(writes.unbind(1), decays, strict=True):
        before.append(now)
        now = write + now if decay is None else torch.addcmul(write, now, decay)
    return torch.stack(before, dim=1), now


def add_normaliser(value: Float[Tensor, "*batch tokens value_dim"]) -> Float[Tensor, "*batch tokens columns"]:
    """The values and a column of ones, which gathers ``sum_j w_j`` beside ``sum_j w_j v_j``."""
    return F.pad(value, (0, 1), value=1.0)


def divide_by_normaliser(
    out: Float[Tensor, "*batch tokens columns"], eps: float = 1e-10
) -> Float[Tensor, "*batch tokens value_dim"]:
    """Outputs over their last column."""
    return out[..., :-1] / (out[..., -1:] + eps)
