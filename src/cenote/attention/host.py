"""The decoder inside a transformers model, and what its layers are given in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from cenote.attention.cache import PreallocatedLayer

CACHE_NAMES = ("cache", "past_key_values")
"""The argument and output that holds a cache: the new name and the old one."""


@dataclass(frozen=True)
class Host:
    """A model and the text decoder in it.

    Attributes:
        model: the model as the user holds it.
        decoder: its part with the layers.
    """

    model: nn.Module
    decoder: nn.Module

    @classmethod
    def of(cls, model: Any) -> Host:
        """Find the decoder: the module whose ``layers`` each have a ``self_attn`` that knows its number.

        Raises:
            TypeError: no torch module.
            ValueError: none, or several.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a transformers model, got {type(model).__name__}")
        found = [part for part in model.modules() if _is_decoder(part)]
        if len(found) != 1:
            raise ValueError(
                f"{type(model).__name__} has {len(found) or 'no'} text decoder(s) (layers with a causal self_attn that "
                "knows its layer_idx): expected a decoder such as Llama, Mistral, Qwen or Gemma"
            )
        return cls(model, found[0])

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self.decoder.config

    @cached_property
    def layers(self) -> tuple[Any, ...]:
        """The decoder's layers."""
        return tuple(self.decoder.layers)  # type: ignore[arg-type]

    @property
    def attentions(self) -> tuple[Any, ...]:
        """The layers' attention modules."""
        return tuple(layer.self_attn for layer in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(self.attentions[0].head_dim)

    def unserved(self) -> dict[int, str]:
        """Layers that attend otherwise than by plain causal softmax, and why: windows, soft caps, sinks."""
        kinds = getattr(self.config, "layer_types", None)
        everywhere = None if kinds else getattr(self.config, "sliding_window", None)
        why: dict[int, str] = {}
        for layer, attention in enumerate(self.attentions):
            window = getattr(attention, "sliding_window", None) or everywhere
            if window:
                why[layer] = f"a sliding window of {window}"
            elif kinds and kinds[layer] not in ("full_attention", "attention"):
                why[layer] = kinds[layer].replace("_", " ")
            elif getattr(attention, "attn_logit_softcapping", None):
                why[layer] = "soft-capped logits"
            elif getattr(attention, "sinks", None) is not None:
                why[layer] = "learned sinks"
        return why


@dataclass(frozen=True)
class LayerInputs:
    """What an attention module was called with.

    Attributes:
        hidden: its input behind the layer's norm, ``(batch, queries, dim)``.
        rotary: cosines and sines of the queries' positions, ``(batch, queries, head_dim)`` each, if the host has them.
        cache: the layer's place in the cache, if there is one.
    """

    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    cache: Any

    @classmethod
    def from_call(cls, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
        """Read them from the arguments of the host's attention."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = cache_of(kwargs)
        place = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
        return cls(hidden, kwargs.get("position_embeddings"), place)


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """The cache among a host's arguments, under either name."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def output_cache(output: Any) -> Any:
    """The cache in a host's output, under either name."""
    return next((getattr(output, name) for name in CACHE_NAMES if getattr(output, name, None) is not None), None)


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as an argument of a host's forward, under the name that this transformers uses."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return {next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__): cache}


def give_cache_layers(cache: Cache, make: Callable[..., PreallocatedLayer], num_layers: int, static: bool) -> None:
    """Put layers of ours into a cache that holds nothing yet, in place of growing ones and, if ``static``, fixed ones.

    Layers of other kinds (sliding windows, other methods') stay.

    Raises:
        ValueError: fixed layers that hold tokens already, where they would have to be replaced.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    for number, layer in enumerate(cache.layers[:num_layers]):
        if type(layer) is DynamicLayer and not layer.get_seq_length():
            cache.layers[number] = make()
        elif static and type(layer) is StaticLayer:
            if layer.is_initialized and int(layer.get_seq_length()):
                raise ValueError("the static cache holds tokens already: begin with a fresh one")
            cache.layers[number] = make(capacity=layer.max_cache_len)


def _is_decoder(part: nn.Module) -> bool:
    layers = getattr(part, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(part, "config"):
        return False
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    return all(
        getattr(each, "layer_idx", None) is not None and getattr(each, "is_causal", False) for each in attentions
    )
