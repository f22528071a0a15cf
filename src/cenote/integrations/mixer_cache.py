"""States of recurrent mixers in a transformers cache, so that ``generate`` carries them from token to token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

State = Any


def map_tensors(function: Callable[[Tensor], Tensor], state: State) -> State:
    """A state with the function applied to each of its tensors."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        parts = [map_tensors(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if state is None or isinstance(state, int | float | bool | str):
        return state
    raise TypeError(f"a mixer's state is made of tuples and tensors, got {type(state).__name__}")


class MixerCacheLayer(DynamicLayer):
    """One layer's place in a cache: a mixer's state and the number of tokens it has seen.

    Beam search, contrastive and assisted selection of rows work, since every tensor of a state has the batch in front.
    Going back in time does not: a state cannot forget its last tokens.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state: State = None
        self.seen = 0

    def advance(self, state: State, tokens: int) -> None:
        """Keep the state behind ``tokens`` more tokens."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("this layer of the cache belongs to a mixer and holds no keys and values")

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = map_tensors(lambda x: x.index_select(0, indices.to(x.device)), self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = map_tensors(lambda x: x.repeat_interleave(repeats, dim=0), self.state)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a mixer's state cannot forget its last tokens, so this cache cannot be cropped")

    def offload(self) -> None:
        """States are small and stay where they are."""

    def prefetch(self) -> None:
        """See :meth:`offload`."""


def mixer_layer(cache: Cache, index: int) -> MixerCacheLayer:
    """The mixer's place at a layer of a cache, put there when the cache is new.

    Raises:
        ValueError: a cache of fixed length, or a layer that already holds keys and values.
    """
    while len(cache.layers) <= index:
        if cache.layer_class_to_replicate is None:
            raise ValueError(f"the cache has {len(cache.layers)} layers, and layer {index} was asked for")
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, MixerCacheLayer):
        return layer
    known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    if not (known and isinstance(layer, DynamicLayer)) or layer.get_seq_length():
        raise ValueError(
            f"layer {index} of the cache is a used layer or a {type(layer).__name__}: mixers need a fresh DynamicCache"
        )
    cache.layers[index] = fresh = MixerCacheLayer()
    return fresh


def real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the last ``tokens`` tokens are real, ``(batch, tokens)``, from a host's attention mask of any form.

    Two-dimensional masks say it directly. Of ``(batch, heads, queries, keys)``, boolean or additive, a single query
    sees every real key, and of several each real one sees itself, be the host causal, of a sliding window, or neither.

    Raises:
        TypeError: a block mask, whose entries cannot be read back.
        ValueError: a mask of another rank, such as that of shifted windows.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"cannot read padding from a {type(attention_mask).__name__}: load the host with "
            "attn_implementation='sdpa' or 'eager'"
        )
    seen = attention_mask
    if seen.ndim == 4:
        queries, keys = seen.shape[2:]
        seen = seen[:, 0, 0] if queries == 1 else seen[:, 0].diagonal(keys - queries, dim1=1, dim2=2)
    if seen.ndim != 2:
        raise ValueError(f"cannot read padding from an attention mask of shape {tuple(attention_mask.shape)}")
    if seen.is_floating_point():
        seen = seen > torch.finfo(seen.dtype).min / 2
    seen = seen.bool()[:, -tokens:]
    return None if bool(seen.all()) else seen
