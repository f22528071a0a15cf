"""What a decoder whose layers share attention maps adds to its host's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, no_type_check

from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cenote.attention.plan import LayerPlan
from cenote.ops.shared_attention import FORMS


@no_type_check  # run-time shape checks would take the keyword arguments from the host's dataclass
@dataclass
class EchoAttSettings:
    """The fields, and their checks, in front of a host's configuration.

    Args:
        shared_layers: layers that copy the attention map of the nearest earlier layer that is not among them.
        shared_form: what is handed on: ``"probabilities"``, the map itself, or ``"query_key"``, from which every
            follower makes it again with the model's own kernel, so that no map is kept.
        fresh_dropout: whether a follower draws attention dropout anew; by default it gets the map with the source's
            dropout in it. The paper does not say.

    Raises:
        ValueError: layer 0, repeated or unknown layers, a source with another kind of attention than its follower, an
            unknown form, or dropout inside a kernel that cannot hand it on.
    """

    shared_layers: list[int] = field(default_factory=list)
    shared_form: str = "probabilities"
    fresh_dropout: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        dropout: float = getattr(self, "attention_dropout", 0.0)
        self.shared_layers = sorted(int(layer) for layer in self.shared_layers)
        if self.shared_form not in FORMS:
            raise ValueError(f"shared_form must be one of {', '.join(FORMS)}, got {self.shared_form!r}")
        if self.shared_layers and dropout and self.shared_form == "query_key" and not self.fresh_dropout:
            raise ValueError("a kernel cannot hand its dropout on: 'query_key' with dropout needs fresh_dropout=True")
        plan, kinds = self.layer_plan, getattr(self, "layer_types", None)
        for layer in plan.layers("reuse"):
            source = plan.source(layer)
            if kinds and kinds[layer] != kinds[source]:
                raise ValueError(
                    f"layer {layer} ({kinds[layer]}) cannot share with layer {source} ({kinds[source]}): expected equal"
                )

    @property
    def layer_plan(self) -> LayerPlan:
        """Which layer copies from which."""
        return LayerPlan.from_shared(self.num_hidden_layers, self.shared_layers)  # type: ignore[attr-defined]


@no_type_check
class EchoAttLlamaConfig(EchoAttSettings, LlamaConfig):
    """A :class:`transformers.LlamaConfig` with the fields of :class:`EchoAttSettings`."""

    model_type = "echo_att_llama"


@no_type_check
class EchoAttMistralConfig(EchoAttSettings, MistralConfig):
    """A :class:`transformers.MistralConfig` with the fields of :class:`EchoAttSettings`."""

    model_type = "echo_att_mistral"


@no_type_check
class EchoAttQwen2Config(EchoAttSettings, Qwen2Config):
    """A :class:`transformers.Qwen2Config` with the fields of :class:`EchoAttSettings`."""

    model_type = "echo_att_qwen2"


@no_type_check
class EchoAttQwen3Config(EchoAttSettings, Qwen3Config):
    """A :class:`transformers.Qwen3Config` with the fields of :class:`EchoAttSettings`."""

    model_type = "echo_att_qwen3"


@no_type_check
class EchoAttGemmaConfig(EchoAttSettings, GemmaConfig):
    """A :class:`transformers.GemmaConfig` with the fields of :class:`EchoAttSettings`."""

    model_type = "echo_att_gemma"
