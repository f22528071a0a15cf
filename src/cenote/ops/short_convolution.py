"""A short causal convolution of each channel by itself, which can be continued."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def short_convolution(
    x: Float[Tensor, "batch tokens dim"],
    weight: Float[Tensor, "dim 1 length"],
    past: Tensor | None = None,
    counts: Int[Tensor, "batch"] | None = None,
) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch before dim"]]:
    """``y_t = sum_l w_l x_(t - length + 1 + l)`` and the last ``length - 1`` inputs, which the next stretch needs.

    Args:
        past: ``(batch, length - 1, dim)`` inputs before the first, oldest in front; ``None`` for zeros.
        counts: real tokens of each row, which stand in front of its padding. Padding is not remembered.

    Raises:
        ValueError: other inputs before the first than ``(batch, length - 1, dim)``.
    """
    before, tokens = weight.shape[-1] - 1, x.shape[1]
    empty = x.new_zeros(x.shape[0], before, x.shape[2])
    past = empty if past is None else past.to(x.dtype)
    if past.shape != empty.shape:
        raise ValueError(f"a convolution continues from inputs {tuple(empty.shape)}, got {tuple(past.shape)}")
    joined = torch.cat([past, x], dim=1)
    mixed = F.conv1d(joined.transpose(1, 2), weight, groups=weight.shape[0]).transpose(1, 2)
    if counts is None:
        return mixed, joined[:, tokens:]
    last = counts[:, None] + torch.arange(before, device=x.device)
    return mixed, joined.gather(1, last.unsqueeze(-1).expand(-1, -1, x.shape[2]))
