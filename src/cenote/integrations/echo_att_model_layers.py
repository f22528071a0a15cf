"""Attention modules that hand their map on or take one over, made of the host's own parts."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cenote.attention.host import cache_of
from cenote.ops.shared_attention import apply_map, attention_map

QUERY_KEY_PARTS = ("q_proj", "k_proj", "q_norm", "k_norm")
"""What a layer that copies its map does not need."""


class SharedMaps:
    """What sources hand to their followers within one forward pass.

    It travels among the keyword arguments that a host passes to its layers. Not a mapping, which placing on devices
    would copy.
    """

    def __init__(self) -> None:
        self.handed: dict[int, tuple[Tensor, ...]] = {}

    def take(self, source: int, last: bool, device: torch.device) -> tuple[Tensor, ...]:
        """What the source left; forgotten behind the last follower, unless a checkpointed layer may run again."""
        handed = self.handed[source]
        if last and not torch.is_grad_enabled():
            del self.handed[source]
        return tuple(tensor.to(device) for tensor in handed)


class EchoAttention(nn.Module):
    """The parts and settings of a host's attention module, under their names."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, host: nn.Module, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name, value in vars(host).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, part in host.named_children():
            if name not in without:
                setattr(self, name, part)
        self.host_module = type(host).__module__
        self.form, self.fresh_dropout = host.config.shared_form, host.config.fresh_dropout  # type: ignore[union-attr]

    def heads(self, projected: Tensor) -> Tensor:
        """``(batch, tokens, heads * head_dim)`` to ``(batch, heads, tokens, head_dim)``."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @property
    def dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Attention by the model's own implementation, ``(batch, queries, heads, head_dim)``."""
        eager: Any = sys.modules[self.host_module].eager_attention_forward
        run: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if getattr(self, "sliding_window", None) is not None:
            kwargs["sliding_window"] = self.sliding_window
        return run(self, query, key, value, mask, dropout=self.dropout, scaling=self.scaling, **kwargs)

    def by_map(self, weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """A map applied to values; the map itself where the host's explicit implementation would give it."""
        output = apply_map(weights, value).transpose(1, 2)
        return output, weights if self.config._attn_implementation == "eager" else None

    def project(self, attended: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        output, weights = attended
        return self.o_proj(output.flatten(2)), weights


class SourceAttention(EchoAttention):
    """A layer that attends as its host does and hands on its map, or its queries and keys."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        shared_maps: SharedMaps | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        assert shared_maps is not None
        query, key = self.heads(self.q_proj(hidden_states)), self.heads(self.k_proj(hidden_states))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        value, cache = self.heads(self.v_proj(hidden_states)), cache_of(kwargs)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.form == "query_key":
            shared_maps.handed[self.layer_idx] = query, key
            return self.project(self.fused(query, key, value, attention_mask, **kwargs))
        clean = attention_map(query, key, _explicit(attention_mask, query, key), scale=self.scaling)
        dropped = F.dropout(clean, self.dropout) if self.dropout else clean
        shared_maps.handed[self.layer_idx] = (clean if self.fresh_dropout else dropped,)
        return self.project(self.by_map(dropped, value))


class SharedAttention(EchoAttention):
    """A layer with values and an output projection of its own and the attention map of its source.

    Attributes:
        source: the layer that it copies from.
        last: whether it is its source's last follower.
    """

    def __init__(self, host: nn.Module, source: int, last: bool) -> None:
        super().__init__(host, without=QUERY_KEY_PARTS)
        self.source, self.last = source, last

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        shared_maps: SharedMaps | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        assert shared_maps is not None
        value, cache = self.heads(self.v_proj(hidden_states)), cache_of(kwargs)
        if cache is not None:
            value = cache.update(value[..., :0], value, self.layer_idx)[1]
        handed = shared_maps.take(self.source, self.last, value.device)
        if self.form == "query_key":
            return self.project(self.fused(handed[0], handed[1], value, attention_mask, **kwargs))
        (weights,) = handed
        if self.fresh_dropout and self.dropout:
            weights = F.dropout(weights, self.dropout)
        return self.project(self.by_map(weights, value))


def _explicit(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """The host's mask for an explicit map. A fused kernel is given none where plain causal order is meant."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask[..., :keys]
    if mask is not None:
        raise ValueError(
            "maps are made from a mask (batch, 1, queries, keys) or none: set shared_form='query_key' for recipes and "
            f"kernels with masks of another form, such as {type(mask).__name__}"
        )
    if queries == 1:
        return None
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
