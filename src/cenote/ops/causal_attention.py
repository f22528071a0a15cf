"""Softmax attention with the pieces that mixers share: who sees whom, and the map where it is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import widen


def all_real(
    tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
) -> Bool[Tensor, "batch tokens"]:
    """The mask, or one in which every token is real."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask


def visible(
    queries: int, real: Bool[Tensor, "batch keys"] | None, keys: int, causal: bool, device: torch.device
) -> Bool[Tensor, "rows 1 queries keys"] | None:
    """Which keys each query sees: real ones and, if ``causal``, none behind itself. ``None`` if it sees all.

    The queries are the last ``queries`` of the ``keys`` tokens. Each sees itself even where it is padding, so that no
    row is empty.
    """
    if real is None and not causal:
        return None
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(keys - queries)
    if real is None:
        return seen
    itself = torch.eye(queries, keys, dtype=torch.bool, device=device).roll(keys - queries, 1)
    return seen & real[:, None, None] | itself


def attend(
    query: Float[Tensor, "rows heads queries head_dim"],
    key: Float[Tensor, "rows heads keys head_dim"],
    value: Float[Tensor, "batch heads keys width"],
    seen: Bool[Tensor, "#batch 1 #queries keys"] | None = None,
    return_weights: bool = False,
) -> tuple[Float[Tensor, "batch heads queries width"], Float[Tensor, "maps heads queries keys"] | None]:
    """``softmax(Q K^T / sqrt(head_dim)) V`` over the keys seen, and the map if wanted.

    Queries and keys of one row serve every item of the batch: the map is then formed once.
    """
    shared = query.shape[0] == 1 < value.shape[0] and (seen is None or seen.shape[0] == 1)
    if not return_weights and not shared:
        rows = value.shape[0]
        return F.scaled_dot_product_attention(
            query.expand(rows, -1, -1, -1), key.expand(rows, -1, -1, -1), value, seen
        ), None
    scores = widen(query) @ widen(key).transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = (scores if seen is None else scores.masked_fill(~seen, float("-inf"))).softmax(dim=-1)
    return weights.to(value.dtype) @ value, weights if return_weights else None
