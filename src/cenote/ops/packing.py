"""Sequences packed end to end in one row, laid out as padded rows and back.

A recurrence over packed sequences has to begin anew at every boundary, its convolutions too. As rows of a batch the
sequences are apart whatever the rule; what that costs is the padding behind the shorter ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def unpack(
    x: Float[Tensor, "total dim"], cu_seqlens: Int[Tensor, "ends"]
) -> tuple[Float[Tensor, "sequences tokens dim"], Bool[Tensor, "sequences tokens"]]:
    """Each sequence as a row, padded with 0 on the right, and the mask of real tokens; ``padded[mask]`` is ``x``.

    Args:
        x: tokens of all sequences.
        cu_seqlens: where each sequence begins, and after the last its end: 0, ..., ``total``.

    Raises:
        ValueError: boundaries that do not begin with 0, grow, and end with the number of tokens.
    """
    lengths = cu_seqlens.diff()
    if len(lengths) == 0 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(x) or bool((lengths < 1).any()):
        raise ValueError(f"cu_seqlens grows from 0 to the {len(x)} tokens that there are, got {cu_seqlens.tolist()}")
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths.to(x.device)[:, None]
    return x.new_zeros(*mask.shape, x.shape[1]).masked_scatter(mask.unsqueeze(-1), x), mask
