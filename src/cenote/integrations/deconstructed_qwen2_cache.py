"""What the layers of a deconstructed language model keep of the past, in transformers' cache interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from cenote.integrations.deconstructed_qwen2_config import FIXED
from cenote.integrations.mixer_cache import MixerCacheLayer

OUTPUT = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache in a model's output; the name changed with version 5.24."""


class ValueLayer(DynamicLayer):
    """Values of the past without keys, for layers whose map does not depend on the tokens."""

    def extend(self, values: Tensor) -> Tensor:
        """Add the values of new tokens ``(batch, heads, tokens, head_dim)``; gives all so far."""
        return self.update(values[..., :0], values)[1]

    def get_seq_length(self) -> int:
        return 0 if self.values is None or not self.values.numel() else self.values.shape[-2]


class DeconstructedCache(Cache):
    """One cache layer for each layer of the model: keys and values (standard, static), values (fixed maps), a state
    of fixed size (approximate, non-approximate), or only a count (MLP).

    Args:
        variants: the variant of each layer.
    """

    def __init__(self, variants: list[str]) -> None:
        super().__init__(layers=[self._layer(variant) for variant in variants])

    @staticmethod
    def _layer(variant: str) -> CacheLayerMixin:
        if variant in FIXED:
            return ValueLayer()
        return DynamicLayer() if variant in ("standard", "static") else MixerCacheLayer()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, whichever layer is asked: the first may have been left out of the run."""
        return max(Cache.get_seq_length(self, index) for index in range(len(self.layers)))

    def is_complete(self, layers: Iterable[int]) -> bool:
        """Whether each of these layers has seen all tokens so far."""
        return all(Cache.get_seq_length(self, index) == self.get_seq_length() for index in layers)

    def extend(self, values: Tensor, layer_idx: int) -> Tensor:
        """Add the values of new tokens to a layer of fixed maps; gives all so far."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, ValueLayer)
        return layer.extend(values)

    def state(self, layer_idx: int) -> Any:
        """The recurrent state of a layer; ``None`` for an empty past."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, MixerCacheLayer)
        return layer.state

    def advance(self, state: tuple[Tensor, ...], tokens: int, layer_idx: int) -> None:
        """Put a layer's state behind so many new tokens in the old one's place."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, MixerCacheLayer)
        layer.advance(state, tokens)

    def num_bytes(self) -> int:
        """Bytes of everything kept."""
        names = ("keys", "values", "state")
        held = [getattr(layer, name, None) for layer in self.layers for name in names]
        tensors = [x for one in held for x in (one if isinstance(one, tuple) else (one,)) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)
