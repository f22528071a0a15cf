"""PoNet as an encoder of transformers: BERT with pooling in place of attention."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPooler,
    BertSelfOutput,
)

from cenote.integrations.ponet_config import PoNetConfig
from cenote.mixing.base import MixerContext
from cenote.mixing.ponet import PoNet
from cenote.ops.masked import zero_padding
from cenote.ops.segments import segments_between

BLOCK = 512
"""Tokens that pass the feed-forward network together in inference on a processor, where they stay in its cache."""


class PoNetPooling(nn.Module):
    """The mixer and the map, residual and norm behind it, under the names that a BERT layer gives them."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.self = PoNet(config.hidden_size, config.num_attention_heads, config.clsgsepg)
        self.output = BertSelfOutput(config)

    def forward(self, hidden: Tensor, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, Tensor]:
        """The same shape, and the weights of the global pooling ``(batch, heads, tokens)``."""
        pools = self.self.pools(hidden, mask, context)
        assert pools.overall is not None
        mixed = zero_padding(self.self.fuse(hidden, pools), mask)
        return self.output(mixed, hidden), pools.overall.weights


class PoNetLayer(GradientCheckpointingLayer):
    """``h = LN(x + W P(x)); LN(h + FFN(h))``, with P of :class:`cenote.mixing.ponet.PoNet`."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.attention = PoNetPooling(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, hidden: Tensor, mask: Tensor | None, context: MixerContext) -> tuple[Tensor, Tensor]:
        """As :meth:`PoNetPooling.forward`."""
        mixed, weights = self.attention(hidden, mask, context)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or mixed.device.type != "cpu":
            return self._feed_forward(mixed), weights
        parts = [self._feed_forward(part) for part in mixed.flatten(0, 1).split(BLOCK)]
        return torch.cat(parts).view_as(mixed), weights

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class PoNetEncoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config: PoNetConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(PoNetLayer(config) for _ in range(config.num_hidden_layers))


class PoNetPreTrainedModel(PreTrainedModel):
    """Start, loading and saving of PoNet models."""

    config_class = PoNetConfig
    base_model_prefix = "ponet"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PoNetLayer"]  # noqa: RUF012 (transformers declares it for instances)
    # A buffer that older transformers wrote into every checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BertEmbeddings):
            # Not in checkpoints, so a model that was built without storage has them to make.
            positions: Tensor = module.position_ids
            positions.copy_(torch.arange(positions.shape[-1], device=positions.device).expand(1, -1))
            module.token_type_ids.zero_()


class PoNetModel(PoNetPreTrainedModel):
    """Embeddings, PoNet layers, and a tanh map of the first token.

    Beside BERT's input it takes ``segment_ids`` (default: what special tokens cut apart, see
    :func:`cenote.ops.segments.segments_between`) and ``special_mask`` (default: where ``input_ids`` are the
    configuration's ``special_token_ids``). ``attentions`` are the weights of the global poolings,
    ``(batch, heads, tokens)`` a layer. Keys are those of the published checkpoints.

    Otherwise than in the official code: special tokens of any tokenizer; ``inputs_embeds``; padding on either side,
    with positions counted from the first real token; a mask in place of -10000; a row without a real token is refused.
    Head masks, cross-attention, caches and pruning, which the official code takes and ignores, are not taken.

    Raises:
        ValueError: more tokens than positions; both or none of ``input_ids`` and ``inputs_embeds``; masks of another
            shape; embeddings without ``special_mask`` where it is needed; what :class:`cenote.mixing.ponet.PoNet`
            refuses.
    """

    def __init__(self, config: PoNetConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = PoNetEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Make room for longer rows by repeating the table of positions, as published for texts of 4096 tokens."""
        length = new_num_position_embeddings
        old = self.embeddings.position_embeddings
        if length < old.num_embeddings:
            raise ValueError(f"the model has {old.num_embeddings} positions already, asked for {length}")
        new = nn.Embedding(length, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            new.weight.copy_(old.weight.repeat(-(-length // old.num_embeddings), 1)[:length])
        self.embeddings.position_embeddings = new
        self.embeddings.position_ids = torch.arange(length, device=old.weight.device).expand(1, -1)
        self.embeddings.token_type_ids = torch.zeros_like(self.embeddings.position_ids)
        self.config.max_position_embeddings = length

    def get_position_embeddings(self) -> nn.Embedding:
        return self.embeddings.position_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        special_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Hidden states of every token, and the pooled first one."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        limit = self.config.max_position_embeddings
        if given.shape[1] > limit:
            raise ValueError(f"the model has {limit} positions, got {given.shape[1]} tokens")
        for name, value in (("attention_mask", attention_mask), ("special_mask", special_mask)):
            if value is not None and value.shape != given.shape[:2]:
                raise ValueError(f"expected {name} of shape {tuple(given.shape[:2])}, got {tuple(value.shape)}")
        mask = None if attention_mask is None else _real_tokens(attention_mask)
        context = self._context(input_ids, segment_ids, special_mask, mask)
        if position_ids is None and mask is not None:
            position_ids = positions_of(mask)
        hidden = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        states, weights = [hidden], []
        for layer in self.encoder.layer:
            hidden, read = layer(hidden, mask, context)
            states.append(hidden)
            weights.append(read)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps = self.config.output_attentions if output_attentions is None else output_attentions
        out = BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else self.pooler(hidden),
            hidden_states=tuple(states) if wanted else None,
            attentions=tuple(weights) if maps else None,
        )
        return finish(self, out, return_dict)

    def _context(
        self,
        input_ids: Tensor | None,
        segment_ids: Tensor | None,
        special_mask: Tensor | None,
        mask: Tensor | None,
    ) -> MixerContext:
        if special_mask is not None:
            special_mask = special_mask.bool()
        elif input_ids is not None:
            special_mask = torch.isin(input_ids, input_ids.new_tensor(self.config.special_token_ids))
        elif self.config.clsgsepg or segment_ids is None:
            raise ValueError(
                "embeddings do not say where class and separator tokens are: pass special_mask (or segment_ids to a "
                "model with clsgsepg=False)"
            )
        if segment_ids is None:
            assert special_mask is not None
            segment_ids = segments_between(special_mask if mask is None else special_mask & mask)
        return MixerContext(segment_ids=segment_ids, special_mask=special_mask)


def positions_of(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Positions counted from a row's first real token; padding in front of it has 0."""
    return (torch.arange(mask.shape[1], device=mask.device) - mask.int().argmax(dim=1, keepdim=True)).clamp_min(0)


def finish(model: PreTrainedModel, out: Any, return_dict: bool | None) -> Any:
    """The output, or a tuple of what it holds where that is asked for."""
    wanted = model.config.return_dict if return_dict is None else return_dict
    return out if wanted else out.to_tuple()


def _real_tokens(attention_mask: Tensor) -> Tensor:
    """A boolean mask from one of 1 and 0 of any type; ``ValueError`` for one that would be added to scores."""
    checked = attention_mask.is_floating_point() and not torch.compiler.is_compiling()
    if checked and bool((attention_mask < 0).any()):
        raise ValueError("expected an attention_mask of 1 for real tokens and 0 for padding, got an additive one")
    return attention_mask.bool()
