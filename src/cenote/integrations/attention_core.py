"""What a bidirectional attention core of ours offers to the hosts that it is put into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cenote.ops.space_filling_curve import GridShape, check_cells


@dataclass(frozen=True)
class Call:
    """One call of the host.

    Attributes:
        shape: grid of visual tokens, ``(frames, height, width)``.
        text_len: further tokens that share the attention: text beside the visual tokens, or class and register tokens.
        order: cell of every visual token in the order of the layers, or ``None`` for raster order.
        number: of this call since a generation began, from 0.
        first_frame: whether the first frame of this host attends itself densely.
    """

    shape: GridShape
    text_len: int
    order: Tensor | None
    number: int
    first_frame: bool = False

    def permute(self, x: Tensor, dim: int, start: int = 0) -> Tensor:
        """Bring the visual tokens of ``x``, which begin at ``start`` of ``dim``, into the order of the layers."""
        return x if self.order is None else self._take(x, dim, start, self.order)

    def restore(self, x: Tensor, dim: int, start: int = 0) -> Tensor:
        """Undo :meth:`permute`."""
        return x if self.order is None else self._take(x, dim, start, self.order.argsort())

    def _take(self, x: Tensor, dim: int, start: int, order: Tensor) -> Tensor:
        check_cells(x.shape[dim] - start, self.shape)
        index = torch.cat([torch.arange(start, device=order.device), order + start])
        return x.index_select(dim, index.to(x.device))


@runtime_checkable
class Core(Protocol):
    """Attention of many visual tokens on a grid and a few others."""

    def order(self, shape: GridShape) -> Tensor | None:
        """The order of the visual tokens between the first layer and the last, ``None`` for the host's own."""
        ...

    def dense(self, layer: int, call: Call) -> bool:
        """Whether this layer of this call runs the host's own attention."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, text_valid: Tensor | None, call: Call) -> Tensor:
        """``(batch, heads, tokens, head_dim)`` each, visual tokens first; ``text_valid`` (batch,) real others."""
        ...
