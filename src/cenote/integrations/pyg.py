"""Poolings as aggregations of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.pooling import create_pooling
from cenote.pooling.base import Pooling
from cenote.pooling.sets import check_order_free, pool_rows

try:
    from torch_geometric.nn.aggr import Aggregation
    from torch_geometric.nn.inits import reset
except ImportError as error:
    raise ImportError("aggregations need PyTorch Geometric: pip install 'cenote[graph]'") from error


class PoolingAggregation(Aggregation):
    """Any order-free pooling of one layer's states as a ``torch_geometric.nn.aggr.Aggregation``.

    ``aggr(x, index)`` gives what the pooling gives for each set padded: a readout of graphs, or the aggregation of
    messages inside a layer (``SAGEConv(..., aggr=PoolingAggregation("gem", dim=64))``). Empty sets give zeros, as
    PyG's own aggregations do. The index may be unsorted.

    Args:
        pooling: a name such as ``"efficient_probing(num_queries=4)"``, or a pooling.
        dim: width of the states, where a name is given.
        **options: of the pooling, where a name is given.

    Raises:
        ValueError: unknown name, a pooling that depends on the order of its tokens (by name), or one that reads all
            layers (:class:`HistoryAggregation` takes those).
    """

    reads = "last"

    def __init__(self, pooling: str | Pooling, dim: int | None = None, **options: Any) -> None:
        super().__init__()
        if isinstance(pooling, str):
            if dim is None:
                raise ValueError(f"{pooling!r} needs dim, the width of the states")
            self.spec: dict[str, Any] | None = {"spec": pooling, "dim": dim, **options}
            pooling = self._build(**self.spec)
        elif dim not in (None, pooling.dim) or options:
            raise ValueError("dim and options go with a pooling's name, not with a pooling that is already built")
        else:
            self.spec = None
        self._check(pooling)
        self.pooling = pooling
        self.out_dim = pooling.out_dim

    def _build(self, **spec: Any) -> Pooling:
        """A pooling by name; one that cannot be built without a grid or a number of layers is refused for reading
        them."""
        try:
            return create_pooling(**spec)
        except TypeError as error:
            try:
                lent = create_pooling(**{"grid": (2, 2), "num_layers": 2, **spec})
            except TypeError:
                lent = None
            if lent is not None:
                self._check(lent)
            missing = str(error).rpartition(": ")[2]
            raise ValueError(f"{spec['spec']!r} needs further options: {missing}") from None

    def _check(self, pooling: Pooling) -> None:
        check_order_free(pooling)
        if pooling.layers != self.reads:
            other = "HistoryAggregation" if self.reads == "last" else "PoolingAggregation"
            layers = "all layers" if pooling.layers == "all" else "one layer"
            raise ValueError(f"{type(pooling).__name__} reads {layers}: use {other}")

    def forward(
        self,
        x: Tensor,
        index: Int[Tensor, "rows"] | None = None,
        ptr: Int[Tensor, "starts"] | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """``(*, rows, dim)`` to ``(*, sets, out_dim)``.

        Args:
            x: states; the set axis is ``dim``, channels come last, every other axis holds sets of its own.
            index: set of each row; or
            ptr: where each set begins, and at last the number of rows.
            dim_size: number of sets; one more than the largest index unless given.
            dim: the axis over which to aggregate.
            max_num_elements: not needed.
        """
        index, size = _sets(index, ptr, dim_size)
        axis = dim % x.ndim
        if axis == x.ndim - 1:
            raise ValueError(f"cannot aggregate over the channels, axis {dim} of {tuple(x.shape)}")
        rows = x.movedim(axis, -2)
        lead = rows.shape[:-2]
        flat = rows.reshape(lead.numel(), rows.shape[-2], rows.shape[-1])  # no -1: there may be no rows at all
        # Each leading place has its own sets: number them on.
        places = torch.arange(len(flat), device=x.device)[:, None]
        pooled = pool_rows(self.pooling, flat.flatten(0, 1), (places * size + index).flatten(), len(flat) * size)
        return pooled.view(*lead, size, self.out_dim).movedim(-2, axis).contiguous()  # callers take views of it

    def reset_parameters(self) -> None:
        """Draw the pooling's parameters anew."""
        if self.spec is None:
            reset(self.pooling)
            return
        fresh = create_pooling(**self.spec)
        self.pooling.load_state_dict(fresh.state_dict())

    def __repr__(self) -> str:
        name = type(self.pooling).__name__ if self.spec is None else self.spec["spec"]
        return f"{type(self).__name__}({name}, out_dim={self.out_dim})"


class HistoryAggregation(PoolingAggregation):
    """Any order-free pooling of all layers as an aggregation of stacked states, ``(nodes, layers, dim)``.

    ``aggr(history, batch)`` gives one vector a graph; the history may be the list of states that
    ``JumpingKnowledge`` takes. For HistoGraph, and layer reductions in front of a pooling
    (``"weighted_layers > mean"``; ``"concat_layers > mean"`` is JumpingKnowledge-cat with a mean).
    """

    reads = "all"

    def __call__(
        self,
        x: Tensor | Sequence[Tensor],
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        # Past Aggregation.__call__, which takes the set axis to be the last but one and x to be one tensor.
        return torch.nn.Module.__call__(self, x, index=index, ptr=ptr, dim_size=dim_size, dim=dim, **kwargs)

    def forward(
        self,
        x: Float[Tensor, "rows layers dim"] | Sequence[Float[Tensor, "rows _"]],
        index: Int[Tensor, "rows"] | None = None,
        ptr: Int[Tensor, "starts"] | None = None,
        dim_size: int | None = None,
        dim: int = 0,
        max_num_elements: int | None = None,
    ) -> Float[Tensor, "sets out_dim"]:
        """As :meth:`PoolingAggregation.forward`; nodes are the first axis."""
        if dim not in (0, -3):
            raise ValueError(f"stacked states are (nodes, layers, dim) and aggregated over axis 0, got dim={dim}")
        if index is None and ptr is None:
            first = x if isinstance(x, Tensor) else x[0]
            index = torch.zeros(len(first), dtype=torch.long, device=first.device)
        index, size = _sets(index, ptr, dim_size)
        return pool_rows(self.pooling, x, index, size)


def _sets(index: Tensor | None, ptr: Tensor | None, size: int | None) -> tuple[Tensor, int]:
    """Set of each row and the number of sets, from either description."""
    if ptr is not None:
        counts = ptr.diff()
        if ptr.ndim != 1 or not len(ptr) or int(ptr[0]) != 0 or bool((counts < 0).any()):
            raise ValueError(f"ptr must rise from 0 to the number of rows, got {ptr.tolist()[:10]}")
        if size not in (None, len(counts)):
            raise ValueError(f"ptr describes {len(counts)} sets, got dim_size={size}")
        return torch.repeat_interleave(torch.arange(len(counts), device=ptr.device), counts), len(counts)
    assert index is not None
    return index, size if size is not None else int(index.max()) + 1 if len(index) else 0
