"""Segments of a sequence: which token belongs to which, and maxima over them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def segment_max(
    values: Float[Tensor, "batch tokens dim"],
    segment_ids: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Maximum over the real tokens of each token's segment: ``out_n = max_{m: id_m = id_n} values_m``.

    The gradient goes to the maximal token alone, in equal parts to several. Ids may come in any order, and rows may
    have different numbers of segments.

    Args:
        segment_ids: 0 to ``tokens - 1``, see :func:`check_segment_ids`; those of padding are not read.
        mask: real tokens; rows of padding come out meaning nothing.
    """
    batch, tokens, dim = values.shape
    # Padding has a bin of its own behind the others, so it needs no filling with a small number. Items lie end to end:
    # along the first axis torch reduces whole rows at once, along the second one number at a time.
    own = segment_ids if mask is None else segment_ids.masked_fill(~mask, tokens)
    bins = (own + torch.arange(batch, device=own.device)[:, None] * (tokens + 1)).flatten()
    flat = values.reshape(-1, dim)
    pooled = flat.new_zeros(batch * (tokens + 1), dim)
    pooled = pooled.scatter_reduce(0, bins[:, None].expand_as(flat), flat, "amax", include_self=False)
    return pooled.index_select(0, bins).view_as(values)


def segments_between(special_mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Ids of the segments that class and separator tokens cut a sequence into.

    Every special token is a segment by itself and so is every stretch between two: ``CLS a b SEP c SEP`` gives
    ``0 1 1 2 3 4``. A row may begin with any token, and special tokens may stand side by side.
    """
    begins = special_mask.clone()
    begins[:, 1:] |= special_mask[:, :-1]
    begins[:, 0] = False
    return begins.cumsum(dim=1)


def equal_segments(
    tokens: int, segment_num: int, mask: Bool[Tensor, "batch tokens"] | None = None, batch: int = 1
) -> Int[Tensor, "batch tokens"]:
    """Ids of at most ``segment_num`` stretches of ``length // segment_num + 1`` tokens, the last one shorter.

    Args:
        tokens: length of the sequences.
        segment_num: how many stretches at most.
        mask: if given, only real tokens count, so that a row keeps its segments whatever padding it has.
        batch: rows, where there is no mask.

    Raises:
        ValueError: ``segment_num`` below 1.
    """
    if segment_num < 1:
        raise ValueError(f"segment_num must be at least 1, got {segment_num}")
    if mask is None:
        return (torch.arange(tokens) // (tokens // segment_num + 1)).expand(batch, -1)
    lengths = mask.sum(dim=1, keepdim=True) // segment_num + 1
    return (mask.cumsum(dim=1) - 1).clamp_min(0) // lengths


def check_segment_ids(
    kind: str, segment_ids: Tensor, tokens: Tensor, mask: Bool[Tensor, "batch tokens"] | None = None
) -> None:
    """Raise if these are no segment ids of ``tokens`` ``(batch, tokens, ...)``; torch.compile does not read values.

    Raises:
        TypeError: ids that are not integers.
        ValueError: another shape; an id of a real token below 0 or not below the number of tokens.
    """
    if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
        raise TypeError(f"{kind} expects integer segment_ids, got {segment_ids.dtype}")
    shape, got = tuple(tokens.shape[:2]), tuple(segment_ids.shape)
    if got != shape:
        raise ValueError(f"{kind} expects segment_ids of shape {shape}, got {got}")
    if torch.compiler.is_compiling():
        return
    real = segment_ids if mask is None else segment_ids[mask]
    low, high = (int(edge) for edge in torch.aminmax(real))
    if low < 0 or high >= shape[1]:
        raise ValueError(f"{kind} expects segment_ids from 0 to {shape[1] - 1} (tokens - 1), got {low} to {high}")
