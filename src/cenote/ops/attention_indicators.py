"""Numbers that say what an attention map looks like.

The indicators of "Deconstructing Attention" (arXiv 2510.11602), for causal maps whose rows sum to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import require_real_tokens, widen


class AttentionIndicators(NamedTuple):
    """Indicators of every head, float32 or better.

    Attributes:
        entropy: mean over queries of ``-sum_k a log a`` in nats, ``(batch, heads)``: 0 where each looks at one token.
        concentration: Frobenius norm of the map, ``(batch, heads)``: ``sqrt(tokens)`` where each looks at one token.
        diversity: mean over query-key pairs of the standard deviation over the heads (population), ``(batch,)``.
        sink: mean weight of the first token, ``(batch, heads)``.
        local_focus: mean weight of the token N before, N = 0, 1, 2, ..., ``(batch, heads, distances)``; 0 where no
            token stands so far before another.
    """

    entropy: Tensor
    concentration: Tensor
    diversity: Tensor
    sink: Tensor
    local_focus: Tensor


def attention_indicators(
    weights: Float[Tensor, "batch heads tokens tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    distances: int = 4,
) -> AttentionIndicators:
    """Indicators of causal attention maps.

    Diversity is over the causal triangle: ``2 / (L (L + 1)) sum_{i>=j} std_h a_hij`` for L tokens. The paper leaves
    open whether entropy is summed or averaged over queries; here it is averaged, so that lengths compare.

    Args:
        weights: maps whose rows sum to 1, 0 on later tokens.
        mask: real tokens, which must follow each other; rows and columns of padding are left out.
        distances: how many distances :attr:`AttentionIndicators.local_focus` has, from 0.

    Raises:
        ValueError: a row of the mask without a real token, or ``distances`` below 1.
    """
    if distances < 1:
        raise ValueError(f"distances must be at least 1, got {distances}")
    require_real_tokens(mask)
    batch, _, tokens, _ = weights.shape
    real = torch.ones(batch, tokens, dtype=torch.bool, device=weights.device) if mask is None else mask
    pairs = (real[:, :, None] & real[:, None, :])[:, None]
    kept = torch.where(pairs, widen(weights), 0.0)
    count = real.sum(dim=1).to(kept.dtype)
    entropy = torch.special.entr(kept).sum(dim=(2, 3)) / count[:, None]
    triangle = count * (count + 1) / 2
    diversity = kept.std(dim=1, correction=0).tril().sum(dim=(1, 2)) / triangle
    first = real.int().argmax(dim=1)
    sink = kept.take_along_dim(first[:, None, None, None], dim=3).sum(dim=(2, 3)) / count[:, None]
    focus = [
        kept.diagonal(-n, dim1=2, dim2=3).sum(dim=-1) / (count - n).clamp(min=1)[:, None] for n in range(distances)
    ]
    concentration = kept.square().sum(dim=(2, 3)).sqrt()
    return AttentionIndicators(entropy, concentration, diversity, sink, torch.stack(focus, dim=-1))
