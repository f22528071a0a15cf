"""Where the real tokens of a row are."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.masked import require_real_tokens


def first_real(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch"]:
    """Number of the first real token of each row."""
    require_real_tokens(mask)
    return mask.int().argmax(dim=1)


def last_real(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch"]:
    """Number of the last real token of each row, whichever side the padding is on."""
    require_real_tokens(mask)
    return (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=1)


def take_token(x: Float[Tensor, "batch tokens dim"], index: Int[Tensor, "batch"]) -> Float[Tensor, "batch dim"]:
    """The token ``x[b, index[b]]`` of each row."""
    return x.gather(1, index.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)
