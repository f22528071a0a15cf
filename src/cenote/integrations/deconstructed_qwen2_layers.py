"""The layers of a deconstructed language model: one attention module for every variant, and the block around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
)

from cenote.integrations.deconstructed_qwen2_cache import DeconstructedCache
from cenote.integrations.deconstructed_qwen2_config import FIXED, DeconstructedQwen2Config
from cenote.ops.key_softmax import key_logits, key_softmax_chunk, key_softmax_weights
from cenote.ops.masked import widen
from cenote.ops.precision import full_precision
from cenote.ops.taylor_attention import taylor_attention_chunk, taylor_attention_map


@dataclass(frozen=True)
class Pass:
    """What one run through the layers has in common.

    Attributes:
        rotation: cosines and sines of the positions, as transformers' rotary embedding gives them.
        seen: the attention mask in the form that the host's attention function takes; ``None`` for plain causal.
        real: which of the new tokens are real, ``(batch, tokens)``; ``None`` for all.
        past: what earlier runs left.
        embeddings: what entered the first layer.
        weights: whether maps are wanted.
        ordinary: softmax attention of the tokens over themselves whatever the variant: how a fixed stream runs.
    """

    rotation: tuple[Tensor, Tensor]
    seen: Any = None
    real: Bool[Tensor, "batch tokens"] | None = None
    past: DeconstructedCache | None = None
    embeddings: Tensor | None = None
    weights: bool = False
    ordinary: bool = False


class DeconstructedAttention(nn.Module):
    """Queries, keys and values of a Qwen2 layer, put together as the layer's variant says.

    ``forward(hidden, source, run, fixed_map)`` takes values from ``hidden``, queries and keys from ``source``
    (the same, or the embeddings), and gives the mixed tokens and, where there is one and it is wanted, the map
    ``(batch, heads, tokens, tokens)``; a fixed map has batch 1.
    """

    def __init__(self, config: DeconstructedQwen2Config, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config, self.layer_idx, self.variant = config, layer_idx, config.variants[layer_idx]
        self.head_dim, self.is_causal = config.head_dim, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.attention_dropout = self.head_dim**-0.5, config.attention_dropout
        wide, narrow = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            Qwen2RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(
        self, hidden: Tensor, source: Tensor, run: Pass, fixed_map: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        value = self._heads(self.v_proj(hidden))
        if run.ordinary or self.variant in ("standard", "static"):
            mixed, weights = self._by_softmax(source, value, run)
        elif self.variant in FIXED:
            assert fixed_map is not None
            mixed, weights = self._by_map(fixed_map, value, run)
        elif self.variant == "approximate":
            mixed, weights = self._by_taylor(source, value, run)
        else:
            mixed, weights = self._by_key(source, value, run)
        return self.o_proj(mixed.flatten(2)), weights

    def fixed_map(self, source: Tensor, rotation: tuple[Tensor, Tensor]) -> Float[Tensor, "1 heads tokens tokens"]:
        """The causal softmax map of a stream over itself."""
        query, key = self._rotated(source, rotation)
        scores = query @ repeat_kv(key, self.num_key_value_groups).transpose(2, 3) * self.scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return widen(scores).masked_fill(later, float("-inf")).softmax(dim=-1).to(query.dtype)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _query_key(self, source: Tensor, silu: bool = False) -> tuple[Tensor, Tensor]:
        query, key = self._heads(self.q_proj(source)), self._heads(self.k_proj(source))
        if silu:
            query = F.silu(query)
        return self.q_norm(query), self.k_norm(key)

    def _rotated(self, source: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(*self._query_key(source), *rotation)

    def _by_softmax(self, source: Tensor, value: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        query, key = self._rotated(source, run.rotation)
        if run.past is not None:
            key, value = run.past.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(
            self, query, key, value, run.seen, scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip

    def _by_map(self, fixed_map: Tensor, value: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        if run.past is not None:
            value = run.past.extend(value, self.layer_idx)
        weights = F.dropout(fixed_map, self.attention_dropout, self.training)
        mixed = weights @ repeat_kv(value, self.num_key_value_groups)
        return mixed.transpose(1, 2), fixed_map

    def _by_key(self, source: Tensor, value: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        # Rotating a token's query and key by the same angle leaves their product as it is.
        query, key = self._query_key(source, silu=True)
        logits = key_logits(query, repeat_kv(key, self.num_key_value_groups))
        state = None if run.past is None else run.past.state(self.layer_idx)
        value = repeat_kv(value, self.num_key_value_groups)
        mixed, state = key_softmax_chunk(logits, value, state, run.real)
        if run.past is not None:
            run.past.advance(state, value.shape[2], self.layer_idx)
        return mixed.transpose(1, 2), key_softmax_weights(logits, run.real) if run.weights else None

    def _by_taylor(self, source: Tensor, value: Tensor, run: Pass) -> tuple[Tensor, Tensor | None]:
        query, key = self._rotated(source, run.rotation)
        key, value = (repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        form: Any = self.config.taylor_form
        state = None if run.past is None else run.past.state(self.layer_idx)
        if self.config.taylor_linear or run.past is not None:
            mixed, after = taylor_attention_chunk(query, key, value, state, run.real, form=form)
            if run.past is not None:
                run.past.advance(after, value.shape[2], self.layer_idx)
        weights = None
        if not self.config.taylor_linear and state is None:
            weights = taylor_attention_map(query, key, run.real, form=form)
            with full_precision(value):
                mixed = (weights @ widen(value)).to(value.dtype)
        return mixed.transpose(1, 2), weights


class DeconstructedQwen2Layer(GradientCheckpointingLayer):
    """A Qwen2 block around a variant: norm, mixer, residual, norm, feed-forward network, residual.

    The mixer of the ``"mlp"`` variant is itself a gated feed-forward network of as many parameters as the attention in
    whose place it stands.
    """

    def __init__(self, config: DeconstructedQwen2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.variant, self.static_norm = layer_idx, config.variants[layer_idx], config.static_norm
        self.self_attn = _matched_mlp(config) if self.variant == "mlp" else DeconstructedAttention(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, run: Pass, fixed_map: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens behind this layer and its map, where it has one and it is wanted."""
        normed, weights = self.input_layernorm(hidden), None
        if isinstance(self.self_attn, Qwen2MLP):
            mixed = self.self_attn(normed)
            if run.past is not None:
                run.past.advance((), hidden.shape[1], self.layer_idx)
        else:
            mixed, weights = self.self_attn(normed, self._source(normed, run), run, fixed_map)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), weights if run.weights else None

    def fixed_map(self, stream: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """The map of a stream at this depth, behind the same norm as the tokens."""
        assert isinstance(self.self_attn, DeconstructedAttention)
        return self.self_attn.fixed_map(self.input_layernorm(stream), rotation)

    def _source(self, normed: Tensor, run: Pass) -> Tensor:
        if self.variant != "static" or run.ordinary:
            return normed
        assert run.embeddings is not None
        return self.input_layernorm(run.embeddings) if self.static_norm else run.embeddings


def _matched_mlp(config: DeconstructedQwen2Config) -> Qwen2MLP:
    inner = config.__class__.from_dict(config.to_dict())
    inner.intermediate_size = config.matched_mlp_width
    return Qwen2MLP(inner)
