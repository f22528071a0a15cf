"""The k best real tokens of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.masked import require_real_tokens


class TopK(NamedTuple):
    """What :func:`masked_topk` chose.

    Attributes:
        values: the scores, best first, ``-inf`` in unused places.
        indices: token numbers; unused places repeat the row's best token, so that gathering with them reads no padding.
        mask: ``True`` where a token was chosen: the first ``min(k, n_real)`` places of a row.
    """

    values: Float[Tensor, "batch *rest k"]
    indices: Int[Tensor, "batch *rest k"]
    mask: Bool[Tensor, "batch *rest k"]


def masked_topk(
    scores: Float[Tensor, "batch *rest tokens"], k: int, mask: Bool[Tensor, "batch tokens"] | None = None
) -> TopK:
    """The ``k`` highest scores of each row among its real tokens, or all of them where a row has fewer.

    Padding is never chosen, not even before a real token whose score is ``-inf``. The last axis of the result is
    ``min(k, tokens)`` long. Order among equal scores is not specified.

    Raises:
        ValueError: ``k`` is below 1, or a row has no real token.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    require_real_tokens(mask)
    k = min(k, scores.shape[-1])
    if mask is None:
        values, indices = scores.topk(k, dim=-1)
        return TopK(values, indices, torch.ones_like(indices, dtype=torch.bool))
    keep = mask.reshape(mask.shape[0], *(1,) * (scores.ndim - 2), mask.shape[1])
    # A real -inf is lifted just above padding's -inf for the ranking only.
    ranked = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~keep, float("-inf"))
    indices = ranked.topk(k, dim=-1).indices
    used = torch.arange(k, device=scores.device) < keep.sum(dim=-1, keepdim=True)
    used = used.expand_as(indices)
    indices = torch.where(used, indices, indices[..., :1])
    values = scores.gather(-1, indices).masked_fill(~used, float("-inf"))
    return TopK(values, indices, used)
