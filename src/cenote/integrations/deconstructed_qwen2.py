"""A Qwen2-type causal language model in which each layer drops one principle of attention.

Source: "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling" (arXiv 2510.11602).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from cenote.integrations.deconstructed_qwen2_cache import OUTPUT
from cenote.integrations.deconstructed_qwen2_config import DeconstructedQwen2Config
from cenote.integrations.deconstructed_qwen2_model import DeconstructedQwen2Model, DeconstructedQwen2PreTrainedModel


class DeconstructedQwen2ForCausalLM(DeconstructedQwen2PreTrainedModel, GenerationMixin):
    """A causal language model whose layers attend as ``config.variants`` says.

    The models of "Deconstructing Attention" (arXiv 2510.11602), composed from the host's own modules; no official code
    could be compared.

    =================== ============== ==========================================================================
    variant             in the paper   what takes the place of ``softmax(Q K^T / sqrt(d)) V``
    =================== ============== ==========================================================================
    ``standard``        Standard       itself
    ``mlp``             MLP            a gated feed-forward network with as many parameters; no token sees another
    ``approximate``     Approximate    weights ``1 + s + s^2 / 2``, normalised (:mod:`cenote.ops.taylor_attention`)
    ``non_approximate`` Non-approx.    running softmax mean by key logits (:mod:`cenote.ops.key_softmax`)
    ``random_fixed``    RndEmbQK       the map of a stream that starts from fixed random embeddings
    ``text_fixed``      FixedSeqQK     the map of a stream that starts from a fixed text (:meth:`set_fixed_text`)
    ``static``          StaticEmbQK    queries and keys from the token embeddings at every layer
    =================== ============== ==========================================================================

    All keep Qwen2's parameter names and shapes, so that checkpoints load across variants; the ``"mlp"`` mixer has
    ``gate_proj``, ``up_proj`` and ``down_proj``. Rotary positions and the causal mask stay in all variants with maps,
    grouped keys and values work in all. A fixed stream runs through every layer with that layer's ordinary attention
    and feed-forward network, and is read behind the same norm as the tokens; its maps are cached in inference (without
    gradients) and dropped when weights change. ``generate`` works for every variant with
    :class:`cenote.integrations.deconstructed_qwen2_cache.DeconstructedCache`.

    With ``output_attentions=True`` (attention implementation ``"eager"`` for standard and static layers),
    ``attentions`` has one entry a layer, ``None`` where a layer has no map; fixed maps have batch 1.

    Raises:
        ValueError: left padding or more tokens than ``fixed_rows`` with fixed variants; maps asked of the linear form
            of ``"approximate"`` or, behind a past, of a recurrent variant; a cache that is not empty and of another
            kind or from a run through other layers; packed sequences (positions that begin anew) with variants that
            cannot keep them apart.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeconstructedQwen2Config) -> None:
        super().__init__(config)
        self.model = DeconstructedQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **loss_settings: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits ``(batch, tokens, vocabulary)`` and, with ``labels``, the next-token loss."""
        inner = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, cache=cache,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(inner.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_settings)
        past: dict[str, Any] = {OUTPUT: getattr(inner, OUTPUT)}
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=inner.hidden_states, attentions=inner.attentions, **past
        )
        return result.to_tuple() if return_dict is False else result

    @torch.no_grad()
    def set_fixed_text(self, ids: Int[Tensor, "rows"]) -> None:
        """The text whose embeddings start the stream of ``"text_fixed"``: ``fixed_rows`` tokens.

        Raises:
            ValueError: no such layer, another number of tokens, or ids outside the vocabulary.
        """
        buffer = self.model.fixed_input_ids
        if buffer is None:
            raise ValueError("this model has no 'text_fixed' layer")
        if tuple(ids.shape) != tuple(buffer.shape) or bool(((ids < 0) | (ids >= self.vocab_size)).any()):
            raise ValueError(f"expected {len(buffer)} ids below {self.vocab_size}, got shape {tuple(ids.shape)}")
        buffer.copy_(ids)

    def drop_fixed_maps(self) -> None:
        """Forget cached maps, after weights were changed in a way that torch does not count."""
        self.model.map_cache.drop()

    @contextmanager
    def without_simple_layers(self) -> Iterator[None]:
        """Within the block only the standard layers run ("Skip" in the paper), with fresh caches."""
        before, self.model.skips_simple = self.model.skips_simple, True
        self.drop_fixed_maps()
        try:
            yield
        finally:
            self.model.skips_simple = before

    @classmethod
    def from_qwen2(
        cls, host: PreTrainedModel, variants: str | list[str], hybrid: str | None = None, **settings: Any
    ) -> DeconstructedQwen2ForCausalLM:
        """A model with the weights of a ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM`` and other attention.

        Everything that has a place is copied; the mixers of ``"mlp"`` layers and the random embeddings are new.

        Raises:
            ValueError: another kind of model, or one with sliding windows.
        """
        kind = host.config.model_type
        if kind not in ("qwen2", "qwen3"):
            raise ValueError(f"expected a Qwen2 or Qwen3 language model, got {kind!r}")
        wanted = {k: v for k, v in host.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
        wanted |= {"qk_norm": kind == "qwen3", "qkv_bias": getattr(host.config, "attention_bias", True)}
        config = DeconstructedQwen2Config(**{**wanted, "variants": variants, "hybrid": hybrid, **settings})
        model = cls(config)
        nn.Module.to(model, device=host.device, dtype=host.dtype)
        own = model.state_dict()
        theirs = {name: value for name, value in host.state_dict().items() if name in own}
        model.load_state_dict(theirs, strict=False)
        return model.train(host.training)


AutoConfig.register(DeconstructedQwen2Config.model_type, DeconstructedQwen2Config, exist_ok=True)
AutoModel.register(DeconstructedQwen2Config, DeconstructedQwen2Model, exist_ok=True)
AutoModelForCausalLM.register(DeconstructedQwen2Config, DeconstructedQwen2ForCausalLM, exist_ok=True)
