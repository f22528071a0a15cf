"""Poolings on sets laid end to end: what graph libraries call sparse input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.ops.ragged import check_index, pool_sets
from cenote.pooling.base import Pooling


def check_order_free(pooling: Pooling) -> None:
    """Raise ``ValueError`` naming the pooling if the order of its tokens or their grid matters: sets have neither."""
    if not pooling.permutation_invariant:
        raise ValueError(f"{_name(pooling)} depends on the order of its tokens, and a set has none")
    if getattr(pooling, "pooling", pooling).needs_grid:
        raise ValueError(f"{_name(pooling)} reads a grid of patches, and a set has none")


def pool_rows(
    pooling: Pooling,
    rows: Float[Tensor, "rows dim"] | Float[Tensor, "rows layers dim"] | Sequence[Float[Tensor, "rows _"]],
    index: Tensor,
    size: int | None = None,
) -> Float[Tensor, "sets out_dim"]:
    """The vector of every set; empty sets give zeros.

    Equal to the padded form, but computed in groups of sets of similar size. All sets go together where the pooling
    keeps statistics over its batch (batch norm in training).

    Args:
        pooling: order-free.
        rows: states ``(rows, dim)``; for poolings of all layers ``(rows, layers, dim)`` or a list of ``(rows, dim)``,
            one a layer.
        index: set of each row, in any order.
        size: number of sets; needed where some are empty.

    Raises:
        ValueError: a pooling that depends on the order or reads a grid, an index that does not fit, rows of another
            rank.
    """
    check_order_free(pooling)
    own: Any = getattr(pooling, "read_graphs", None)
    if own is not None:
        return own(rows, index, size).graph
    if not isinstance(rows, Tensor):
        rows = torch.stack(list(rows), dim=1)
    rank, axes = (2, "(rows, dim)") if pooling.layers == "last" else (3, "(rows, layers, dim)")
    if rows.ndim != rank:
        raise ValueError(f"{_name(pooling)} expects {axes}, got shape {tuple(rows.shape)}")
    size = check_index(index, len(rows), size)
    if not len(rows):
        return rows.new_zeros(size, pooling.out_dim)
    together = pooling.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pooling.modules())

    def call(padded: Tensor, mask: Tensor) -> Tensor:
        return pooling(padded if rank == 2 else padded.transpose(1, 2), mask)

    return pool_sets(call, rows, index, size, together)


def _name(pooling: Pooling) -> str:
    inner = getattr(pooling, "pooling", pooling)
    return getattr(inner, "name", type(inner).__name__)
