"""The cache of layers that copy their attention: values only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from cenote.attention.cache import PreallocatedLayer


class ValueLayer(PreallocatedLayer):
    """A preallocated layer that keeps values; the keys it is given are dropped, those it returns have width 0."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(key_states[..., :0], value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        # The host's own count takes a layer without keys for an empty one.
        return 0 if self.values is None or not self.values.numel() else self.values.shape[-2]


def give_value_layers(cache: Cache, shared: Iterable[int]) -> None:
    """Put layers that hold only values at these places, where a growing layer is still empty.

    Static and sliding layers stay: given keys of width 0 they keep none.
    """
    for number in shared:
        layer: Any = cache.layers[number]
        if type(layer) in (DynamicLayer, PreallocatedLayer) and not layer.get_seq_length():
            cache.layers[number] = ValueLayer()
