"""The layers of a Qwen2-type language model in which each drops one principle of attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

from cenote.integrations.deconstructed_qwen2_cache import OUTPUT, DeconstructedCache
from cenote.integrations.deconstructed_qwen2_config import FIXED, DeconstructedQwen2Config
from cenote.integrations.deconstructed_qwen2_layers import DeconstructedQwen2Layer, Pass
from cenote.integrations.deconstructed_qwen2_streams import (
    MapCache,
    check_fixed_ids,
    check_fixed_input,
    check_packing,
    stream_maps,
)


class DeconstructedQwen2PreTrainedModel(PreTrainedModel):
    """Loading, saving and the start of weights."""

    config_class = DeconstructedQwen2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeconstructedQwen2Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be taken back, as assisted generation would have to

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeconstructedQwen2Model):
            std = self.config.initializer_range if self.config.fixed_std is None else self.config.fixed_std
            if module.random_embeddings is not None:
                init.normal_(module.random_embeddings, std=std)
            if module.fixed_input_ids is not None:
                init.constant_(module.fixed_input_ids, -1)


class DeconstructedQwen2Model(DeconstructedQwen2PreTrainedModel):
    """Token embeddings, the layers of :attr:`DeconstructedQwen2Config.variants`, and a last norm.

    Buffers: ``random_embeddings (fixed_rows, dim)`` where a layer is ``"random_fixed"``, ``fixed_input_ids
    (fixed_rows,)`` where one is ``"text_fixed"``; both are saved with the weights.
    """

    random_embeddings: Tensor | None
    fixed_input_ids: Tensor | None

    def __init__(self, config: DeconstructedQwen2Config) -> None:
        super().__init__(config)
        assert config.fixed_rows is not None
        rows, width = config.fixed_rows, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layers = nn.ModuleList(DeconstructedQwen2Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)
        kinds = [kind for kind in FIXED if kind in config.variants]
        self.register_buffer("random_embeddings", torch.zeros(rows, width) if FIXED[0] in kinds else None)
        self.register_buffer(
            "fixed_input_ids", torch.full((rows,), -1, dtype=torch.long) if FIXED[1] in kinds else None
        )
        self.gradient_checkpointing = False
        self.skips_simple = False
        self.map_cache = MapCache()
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states behind the last norm; see :class:`DeconstructedQwen2ForCausalLM`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cached = (self.config.use_cache if use_cache is None else use_cache) and not (
            self.gradient_checkpointing and self.training
        )
        past = self._past(past_key_values if cache is None else cache, cached)
        seen = 0 if past is None else past.get_seq_length()
        layers = self._active()
        run = self._run(layers, hidden, attention_mask, position_ids, past, weights)
        total = seen + hidden.shape[1]
        if weights:
            self._check_maps(layers, seen)
        maps = self._fixed_maps(layers, total, attention_mask)
        collected, attentions = [hidden], []
        for layer, fixed in zip(layers, maps, strict=True):
            hidden, attention = layer(hidden, run, None if fixed is None else fixed[..., seen:, :])
            collected.append(hidden)
            attentions.append(attention)
        hidden = self.norm(hidden)
        kept: dict[str, Any] = {OUTPUT: past}
        result = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*collected[:-1], hidden) if states else None,
            attentions=tuple(attentions) if weights else None,
            **kept,
        )
        return result.to_tuple() if return_dict is False else result

    def _active(self) -> list[DeconstructedQwen2Layer]:
        layers = cast("list[DeconstructedQwen2Layer]", list(self.layers))
        kept = [layer for layer in layers if not self.skips_simple or layer.variant == "standard"]
        if not kept:
            raise ValueError("without its simple layers this model has none left")
        return kept

    def _past(self, past: Cache | None, cached: bool) -> DeconstructedCache | None:
        """The cache to use: ours in the place of an empty one of another kind, which is what ``generate`` brings."""
        if past is None or isinstance(past, DeconstructedCache):
            return DeconstructedCache(self.config.variants) if cached and past is None else past
        if past.get_seq_length():
            raise ValueError(f"past_key_values must be a DeconstructedCache, got {type(past).__name__}")
        return DeconstructedCache(self.config.variants) if cached else None

    def _run(
        self,
        layers: list[DeconstructedQwen2Layer],
        hidden: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        past: DeconstructedCache | None,
        weights: bool,
    ) -> Pass:
        seen = 0 if past is None else past.get_seq_length()
        tokens = hidden.shape[1]
        if mask is not None and tuple(mask.shape) != (len(hidden), seen + tokens):
            raise ValueError(
                f"attention_mask must be (batch, tokens) = {(len(hidden), seen + tokens)} with the past counted in, "
                f"got {tuple(mask.shape)}"
            )
        if past is not None and not past.is_complete(layer.layer_idx for layer in layers):
            raise ValueError("past_key_values comes from a run through other layers: begin with a fresh cache")
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens, device=hidden.device)[None]
        elif mask is None and past is None:
            check_packing(position_ids, self.config.variants)
        prepared = None
        if {"standard", "static"} & set(self.config.variants):
            prepared = create_causal_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=past,
                position_ids=position_ids, layer_idx=layers[0].layer_idx, allow_is_causal_skip=not weights,
            )  # fmt: skip
        real = None if mask is None else mask[:, seen:].bool()
        return Pass(self.rotary_emb(hidden, position_ids), prepared, real, past, hidden, weights)

    def _check_maps(self, layers: Iterable[DeconstructedQwen2Layer], seen: int) -> None:
        variants = {layer.variant for layer in layers}
        if "approximate" in variants and (self.config.taylor_linear or seen):
            raise ValueError("the linear form of 'approximate' has no maps: set taylor_linear=False, without a past")
        if "non_approximate" in variants and seen:
            raise ValueError("'non_approximate' keeps no logits of the past: ask for maps without a past")

    def _fixed_maps(
        self, layers: list[DeconstructedQwen2Layer], rows: int, mask: Tensor | None
    ) -> Iterable[Tensor | None]:
        kinds = [kind for kind in FIXED if any(layer.variant == kind for layer in layers)]
        if not kinds:
            return [None] * len(layers)
        most = self.config.fixed_rows
        check_fixed_input(rows, most, mask)
        if self.training or torch.is_grad_enabled():
            return self._stream(layers, kinds, rows)
        return self.map_cache.get(rows, most, self, lambda rows: list(self._stream(layers, kinds, rows)))

    def _stream(self, layers: list[DeconstructedQwen2Layer], kinds: list[str], rows: int) -> Iterator[Tensor | None]:
        streams = {}
        if FIXED[0] in kinds:
            assert self.random_embeddings is not None
            streams[FIXED[0]] = self.random_embeddings[None, :rows].to(self.embed_tokens.weight.dtype)
        if FIXED[1] in kinds:
            assert self.fixed_input_ids is not None
            check_fixed_ids(self.fixed_input_ids)
            streams[FIXED[1]] = self.embed_tokens(self.fixed_input_ids[None, :rows])
        position_ids = torch.arange(rows, device=self.embed_tokens.weight.device)[None]
        rotation = self.rotary_emb(next(iter(streams.values())), position_ids)

        def make_run(stream: Tensor) -> Pass:
            prepared = create_causal_mask(
                config=self.config, inputs_embeds=stream, attention_mask=None, past_key_values=None,
                position_ids=position_ids,
            )  # fmt: skip
            return Pass(rotation, prepared, ordinary=True)

        return stream_maps(layers, streams, rotation, make_run)
