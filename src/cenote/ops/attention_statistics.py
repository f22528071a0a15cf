"""What attention maps say, without keeping them: statistics taken a stretch of queries at a time.

Every function takes queries ``(batch, heads, queries, head_dim)`` and keys ``(batch, kv_heads, keys, head_dim)`` as the
logits are made of them (positions rotated in), the last query being at the last key. Memory is that of ``chunk`` rows
of the maps. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.blocks import num_blocks


def map_rows(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    chunk: int = 256,
) -> Iterator[tuple[slice, Float[Tensor, "batch heads rows keys"]]]:
    """Stretches of ``chunk`` queries and their rows of the attention map; rows of padding queries are 0."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    across = key.float().transpose(-1, -2).unsqueeze(2)
    places = torch.arange(keys, device=key.device)
    for first in range(0, queries, chunk):
        rows = slice(first, min(first + chunk, queries))
        part = query[:, :, rows].float().reshape(batch, kv_heads, heads // kv_heads, -1, head_dim)
        logits = ((part @ across) * scale).reshape(batch, heads, -1, keys)
        own = places[keys - queries + first : keys - queries + rows.stop]
        if causal:
            logits = logits.masked_fill(places > own[:, None], float("-inf"))
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
        weights = logits.softmax(dim=-1)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, own][:, None, :, None], 0.0)
        yield rows, weights


def attention_received(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    chunk: int = 256,
) -> Float[Tensor, "batch heads keys"]:
    """Sum over the real queries of the attention each key receives; a head's entries sum to the real queries."""
    total = torch.zeros(*query.shape[:2], key.shape[2], device=query.device)
    for _, weights in map_rows(query, key, mask, causal=causal, scale=scale, chunk=chunk):
        total += weights.sum(dim=2)
    return total


def attention_entropy(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    chunk: int = 256,
) -> Float[Tensor, "batch heads queries"]:
    """Entropy ``-sum_j a_j log a_j`` in nats of each query's row; 0 for padding queries."""
    rows = [
        -torch.special.xlogy(weights, weights).sum(dim=-1)
        for _, weights in map_rows(query, key, mask, causal=causal, scale=scale, chunk=chunk)
    ]
    return torch.cat(rows, dim=2)


def attention_mass(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    chosen: Bool[Tensor, "batch keys"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    chunk: int = 256,
) -> Float[Tensor, "batch heads queries"]:
    """Share of each query's attention that falls on the chosen keys."""
    rows = [
        (weights * chosen[:, None, None]).sum(dim=-1)
        for _, weights in map_rows(query, key, mask, causal=causal, scale=scale, chunk=chunk)
    ]
    return torch.cat(rows, dim=2)


def block_maxima(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    block_size: int,
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Float[Tensor, "batch heads query_blocks key_blocks"]:
    """Largest attention probability in each pair of blocks, by one row of blocks at a time; the last may be short."""
    keys = key.shape[2]
    missing = num_blocks(keys, block_size) * block_size - keys
    rows = []
    for _, weights in map_rows(query, key, mask, causal=causal, scale=scale, chunk=block_size):
        wide = torch.nn.functional.pad(weights, (0, missing)).unflatten(-1, (-1, block_size))
        rows.append(wide.amax(dim=(2, 4)))
    return torch.stack(rows, dim=2)


def map_similarity(
    maps: list[tuple[Tensor, Tensor]],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    head_mean: bool = False,
    chunk: int = 64,
) -> Float[Tensor, "batch layers layers"]:
    """Cosine similarity of the attention maps of several layers, each given by its queries and keys.

    Maps of an item are flattened over heads, queries and keys (over queries and keys of their mean over heads if
    ``head_mean``), padding left out. Memory is that of ``chunk`` rows of every layer.
    """
    streams = [map_rows(query, key, mask, causal=causal, scale=scale, chunk=chunk) for query, key in maps]
    batch, layers = maps[0][0].shape[0], len(maps)
    inner = torch.zeros(batch, layers, layers, dtype=torch.float64, device=maps[0][0].device)
    for parts in zip(*streams, strict=True):
        rows = [weights.mean(dim=1) if head_mean else weights for _, weights in parts]
        flat = torch.stack([part.flatten(1) for part in rows], dim=1)
        inner += flat @ flat.transpose(1, 2)
    norms = inner.diagonal(dim1=1, dim2=2).sqrt()
    return (inner / (norms[:, :, None] * norms[:, None, :])).float()
