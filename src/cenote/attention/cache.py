"""A layer's keys and values in a transformers cache that is allocated ahead, with room for a method's own state."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class StepState(Protocol):
    """What a method carries from step to step beside keys and values, in :attr:`PreallocatedLayer.state`."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may occur several times."""

    def crop(self, length: int) -> None:
        """Forget everything beyond the first ``length`` tokens."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers that hold more than they need.

    Appending a token writes one row, where a concatenated cache copies all of them: at 16 thousand tokens that copy
    costs more than attention. Full buffers grow by half. Each layer has its own length. ``keys`` and ``values`` are
    views of the tokens held, ``(batch, kv_heads, tokens, head_dim)``; they may be cut shorter or replaced.

    Args:
        capacity: tokens to allocate at first; more when more come.

    Attributes:
        state: what a method keeps here (:class:`StepState`); it follows beams, selections, crops and resets.
    """

    supports_early_init = False

    def __init__(self, capacity: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.capacity = capacity
        self.state: StepState | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self.keys is not None
        length = self.keys.shape[2]
        total = length + key_states.shape[2]
        parts = (key_states, value_states, self.keys, self.values)
        if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
            # Writing into a buffer would spoil what autograd remembers of it.
            return super().update(key_states, value_states)
        views = []
        for number, (held, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            buffer = None if self._buffers is None else self._buffers[number]
            assert held is not None
            if buffer is None or buffer.shape[2] < total or not _begins(held, buffer):
                room = max(total + (total // 2 if length else 0), self.capacity, total + 64)
                buffer = new.new_empty(*new.shape[:2], room, new.shape[3])
                buffer[:, :, :length] = held
            buffer[:, :, length:total] = new
            views.append((buffer, buffer[:, :, :total]))
        (keys, key_view), (values, value_view) = views
        self._buffers, self.keys, self.values = (keys, values), key_view, value_view
        return key_view, value_view

    def reset(self) -> None:
        super().reset()
        self._buffers = self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.state is not None:
            self.state.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length():
            assert self.keys is not None
            assert self.values is not None
            rows = indices.to(self.keys.device)
            if rows.dtype == torch.bool:
                rows = rows.nonzero().flatten()
            keys, values = (held.index_select(0, rows) for held in (self.keys, self.values))
            self.keys, self.values = keys, values
            if self.state is not None:
                self.state.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            assert self.keys is not None
            batch = self.keys.shape[0]
            self.batch_select_indices(torch.arange(batch, device=self.keys.device).repeat_interleave(repeats))


def _begins(held: Tensor, buffer: Tensor) -> bool:
    """Whether the tokens held are the buffer's first ones, in place, and may be written behind."""
    return (
        held.data_ptr() == buffer.data_ptr()
        and held.stride() == buffer.stride()
        and held.shape[:2] == buffer.shape[:2]
        and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    )
