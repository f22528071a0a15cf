"""Decoders whose layers share attention maps, as ordinary transformers models.

Importing this file registers them with transformers' Auto classes, so that ``AutoModelForCausalLM.from_pretrained``
rebuilds what ``save_pretrained`` wrote. Paper: "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language
Models" (arXiv 2409.14595); no official code was found.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GemmaForCausalLM,
    GemmaModel,
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.cache_utils import DynamicCache

from cenote.attention.cache import PreallocatedLayer
from cenote.attention.echo_att_cache import give_value_layers
from cenote.attention.host import cache_argument, cache_of, give_cache_layers
from cenote.integrations.echo_att_model_config import (
    EchoAttGemmaConfig,
    EchoAttLlamaConfig,
    EchoAttMistralConfig,
    EchoAttQwen2Config,
    EchoAttQwen3Config,
)
from cenote.integrations.echo_att_model_layers import (
    QUERY_KEY_PARTS,
    EchoAttention,
    SharedAttention,
    SharedMaps,
    SourceAttention,
)

EXPLICIT = ("eager", "sdpa")
"""Implementations whose masks an explicit map can be made from."""


class EchoAttDecoder(PreTrainedModel):
    """In front of a host's decoder: exchanges the attention of layers that share for modules of the same parts.

    Layers that copy have no query and key projections (nor norms of queries and keys); all other names are the host's.
    Layers that nobody copies from keep the host's attention, fused or not.
    """

    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        plan = config.layer_plan
        for number, layer in enumerate(self.layers):
            source = plan.source(number)
            followers = plan.followers(source)
            if source != number:
                layer.self_attn = SharedAttention(layer.self_attn, source, last=number == followers[-1])
            elif followers:
                layer.self_attn = SourceAttention(layer.self_attn)
        self.post_init()
        # What a dense checkpoint has and this model has not, on purpose; anything else unexpected is reported.
        parts = "|".join(QUERY_KEY_PARTS)
        dropped = {rf"layers\.{number}\.self_attn\.({parts})\." for number in config.shared_layers}
        self._keys_to_ignore_on_load_unexpected = set(self._keys_to_ignore_on_load_unexpected or ()) | dropped

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        """The host's forward pass. Shared layers cache values only, in a cache that is the host's in all else.

        Raises:
            ValueError: an attention implementation that has no maps, with ``shared_form="probabilities"``.
        """
        config = self.config
        shared, form = config.shared_layers, config.shared_form
        if shared and form == "probabilities" and config._attn_implementation not in EXPLICIT:
            raise ValueError(
                f"{config._attn_implementation} makes no attention maps: use one of {', '.join(EXPLICIT)}, or "
                "shared_form='query_key'"
            )
        cache, wanted = cache_of(kwargs), kwargs.get("use_cache")
        wanted = config.use_cache if wanted is None else wanted
        checkpointing = getattr(self, "gradient_checkpointing", False) and self.training and torch.is_grad_enabled()
        if cache is None and wanted and not checkpointing:
            cache = DynamicCache(config=config)
            kwargs |= cache_argument(cache)
        if cache is not None:
            give_cache_layers(cache, PreallocatedLayer, config.num_hidden_layers, static=False)
            give_value_layers(cache, shared)
        return super().forward(input_ids, attention_mask, position_ids, shared_maps=SharedMaps(), **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        _refuse_reentrant(enable, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)


class EchoAttCausalLM(PreTrainedModel):
    """In front of a host's causal language model: puts a decoder that shares in the place of the host's."""

    decoder_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.post_init()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        _refuse_reentrant(enable, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)


def _refuse_reentrant(enable: bool, function: Any) -> None:
    if enable and getattr(function, "keywords", {}).get("use_reentrant", True):
        # It runs layers without gradients, so that none would flow from followers into their source's map.
        raise ValueError("layers that share maps need gradient checkpointing with use_reentrant=False")


def _recorded(host: Any) -> dict[str, Any]:
    """Where transformers finds hidden states and maps: in our attention modules too."""
    found = dict(host._can_record_outputs)
    return {**found, "attentions": [found["attentions"], EchoAttention]}


class EchoAttLlamaModel(EchoAttDecoder, LlamaModel):
    """A :class:`transformers.LlamaModel` with shared maps."""

    config_class = EchoAttLlamaConfig
    _can_record_outputs = _recorded(LlamaModel)


class EchoAttLlamaForCausalLM(EchoAttCausalLM, LlamaForCausalLM):
    """A :class:`transformers.LlamaForCausalLM` with shared maps; see :func:`share_attention`."""

    config_class, decoder_class = EchoAttLlamaConfig, EchoAttLlamaModel


class EchoAttMistralModel(EchoAttDecoder, MistralModel):
    """A :class:`transformers.MistralModel` with shared maps."""

    config_class = EchoAttMistralConfig
    _can_record_outputs = _recorded(MistralModel)


class EchoAttMistralForCausalLM(EchoAttCausalLM, MistralForCausalLM):
    """A :class:`transformers.MistralForCausalLM` with shared maps; see :func:`share_attention`."""

    config_class, decoder_class = EchoAttMistralConfig, EchoAttMistralModel


class EchoAttQwen2Model(EchoAttDecoder, Qwen2Model):
    """A :class:`transformers.Qwen2Model` with shared maps."""

    config_class = EchoAttQwen2Config
    _can_record_outputs = _recorded(Qwen2Model)


class EchoAttQwen2ForCausalLM(EchoAttCausalLM, Qwen2ForCausalLM):
    """A :class:`transformers.Qwen2ForCausalLM` with shared maps; see :func:`share_attention`."""

    config_class, decoder_class = EchoAttQwen2Config, EchoAttQwen2Model


class EchoAttQwen3Model(EchoAttDecoder, Qwen3Model):
    """A :class:`transformers.Qwen3Model` with shared maps."""

    config_class = EchoAttQwen3Config
    _can_record_outputs = _recorded(Qwen3Model)


class EchoAttQwen3ForCausalLM(EchoAttCausalLM, Qwen3ForCausalLM):
    """A :class:`transformers.Qwen3ForCausalLM` with shared maps; see :func:`share_attention`."""

    config_class, decoder_class = EchoAttQwen3Config, EchoAttQwen3Model


class EchoAttGemmaModel(EchoAttDecoder, GemmaModel):
    """A :class:`transformers.GemmaModel` with shared maps."""

    config_class = EchoAttGemmaConfig
    _can_record_outputs = _recorded(GemmaModel)


class EchoAttGemmaForCausalLM(EchoAttCausalLM, GemmaForCausalLM):
    """A :class:`transformers.GemmaForCausalLM` with shared maps; see :func:`share_attention`."""

    config_class, decoder_class = EchoAttGemmaConfig, EchoAttGemmaModel


STUDENTS: dict[str, Any] = {
    "llama": EchoAttLlamaForCausalLM,
    "mistral": EchoAttMistralForCausalLM,
    "qwen2": EchoAttQwen2ForCausalLM,
    "qwen3": EchoAttQwen3ForCausalLM,
    "gemma": EchoAttGemmaForCausalLM,
}
"""The language model that shares maps, by the ``model_type`` of its host."""

for _kind in STUDENTS.values():
    AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
    AutoModel.register(_kind.config_class, _kind.decoder_class, exist_ok=True)
    AutoModelForCausalLM.register(_kind.config_class, _kind, exist_ok=True)


def share_attention(
    model: PreTrainedModel,
    shared_layers: Iterable[int],
    *,
    shared_form: str = "probabilities",
    fresh_dropout: bool = False,
) -> PreTrainedModel:
    """A copy of a causal language model in which some layers copy the attention map of an earlier one.

    The student of EchoAtt (arXiv 2409.14595): query and key projections of those layers are gone, ``hidden (H + Hk) D``
    parameters each, everything else is copied; nothing else may be missing or left over. It generates, caches, trains
    and saves like its host. Layers in ``output_attentions`` appear as with the host.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3 or Gemma causal language model. Windows are served where a follower has
            its source's.
        shared_layers: see :class:`~cenote.integrations.echo_att_model_config.EchoAttSettings`, as for the others.

    Raises:
        ValueError: another kind of model, weights that do not fit, or what the settings refuse.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in STUDENTS or not hasattr(model, "lm_head"):
        expected = ", ".join(sorted(STUDENTS))
        raise ValueError(f"expected a causal language model of the kinds {expected}, got {type(model).__name__}")
    student_class = STUDENTS[kind]
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    config = student_class.config_class(
        **settings, shared_layers=list(shared_layers), shared_form=shared_form, fresh_dropout=fresh_dropout
    )
    with torch.random.fork_rng():
        student = student_class._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    dropped = tuple(f"model.layers.{n}.self_attn.{part}." for n in config.shared_layers for part in QUERY_KEY_PARTS)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(dropped)}
    with torch.no_grad():
        missing, unexpected = student.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"the model does not fit: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    nn.Module.to(student, device=model.device)
    theirs = dict(model.named_buffers())
    for name, buffer in student.named_buffers():  # those that are not saved, such as frequencies, are copied as well
        if name in theirs and theirs[name].shape == buffer.shape:
            buffer.copy_(theirs[name])
    if model.generation_config is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)
