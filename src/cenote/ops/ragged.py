"""Sets of different sizes, laid end to end: rows ``(rows, ...)`` and the set each row belongs to.

Sets are padded in groups of similar size, never all to the largest, so that one huge set among many small ones costs
what it costs alone. Padding takes at most as much room as the rows themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Bucket(NamedTuple):
    """Sets of similar size.

    Attributes:
        sets: their numbers.
        rows: number of the row in each place, 0 on padding.
        mask: ``True`` for a real place.
    """

    sets: Int[Tensor, "sets"]
    rows: Int[Tensor, "sets width"]
    mask: Bool[Tensor, "sets width"]


def check_index(index: Tensor, rows: int, size: int | None) -> int:
    """The number of sets behind a set index, sorted or not.

    Args:
        index: set of each row, whole numbers from 0.
        rows: how many rows there are.
        size: number of sets; ``None`` takes the largest entry, and then no set may be empty.

    Raises:
        TypeError: the index does not hold whole numbers.
        ValueError: wrong shape, negative entries, entries beyond ``size``, gaps without ``size``.
    """
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"the set index must hold whole numbers, got {index.dtype}")
    if index.ndim != 1 or len(index) != rows:
        raise ValueError(f"expected a set index of shape ({rows},), got {tuple(index.shape)}")
    if rows and int(index.min()) < 0:
        raise ValueError(f"set numbers start at 0, got {int(index.min())}")
    needed = int(index.max()) + 1 if rows else 0
    if size is None:
        empty = (torch.bincount(index, minlength=needed) == 0).nonzero().flatten().tolist()
        if empty or not needed:
            raise ValueError(f"without an explicit size no set may be empty, but {empty[:10] or 'all'} have no rows")
        return needed
    if needed > size:
        raise ValueError(f"the set index goes up to {needed - 1}, but there are {size} sets")
    return size


def bucket_sets(index: Int[Tensor, "rows"], size: int, together: bool = False) -> list[Bucket]:
    """Group the sets that are not empty by size: 1, 2, 3 to 4, 5 to 8, and so on.

    Rows of a set keep their order. ``together`` puts all sets into one bucket, whatever that wastes.
    """
    counts = torch.bincount(index, minlength=size)
    order = torch.argsort(index, stable=True)
    starts = counts.cumsum(0) - counts
    filled = counts.nonzero().flatten()
    if not len(filled):
        return []
    kinds = (counts[filled] - 1).clamp(min=0).double().log2().floor().where(counts[filled] > 1, -1.0)
    buckets = []
    for kind in [None] if together else kinds.unique():
        sets = filled if kind is None else filled[kinds == kind]
        place = torch.arange(int(counts[sets].max()), device=index.device)
        mask = place < counts[sets, None]
        rows = order[torch.where(mask, starts[sets, None] + place, 0)]
        buckets.append(Bucket(sets, torch.where(mask, rows, 0), mask))
    return buckets


def pool_sets(
    call: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "rows *rest"],
    index: Int[Tensor, "rows"],
    size: int,
    together: bool = False,
) -> Float[Tensor, "{size} *out"]:
    """Apply a function of padded sets to sets laid end to end; empty sets give zeros.

    Args:
        call: from ``(sets, width, *rest)`` and mask ``(sets, width)`` to ``(sets, *out)``.
        x: the rows.
        index: set of each row, in any order.
        size: number of sets.
        together: one call for all sets, where the function keeps statistics over its batch.

    Raises:
        ValueError: all sets are empty, so that there is nothing to learn the shape of the result from.
    """
    buckets = bucket_sets(index, size, together)
    if not buckets:
        raise ValueError(f"all {size} sets are empty")
    parts = [call(x[bucket.rows], bucket.mask) for bucket in buckets]
    sets = torch.cat([bucket.sets for bucket in buckets])
    pooled = torch.cat(parts)
    return pooled.new_zeros(size, *pooled.shape[1:]).index_copy(0, sets, pooled)


def mean_sets(x: Float[Tensor, "rows dim"], index: Int[Tensor, "rows"], size: int) -> Float[Tensor, "{size} dim"]:
    """Mean of the rows of each set, 0 for an empty one."""
    total = x.new_zeros(size, x.shape[1]).index_add(0, index, x)
    return total / torch.bincount(index, minlength=size).clamp(min=1)[:, None]
