"""Published NV-Embed checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cenote.backbones.bidirectional import make_bidirectional
from cenote.pooling.latent_attention import LatentAttention

if TYPE_CHECKING:
    from transformers import MistralModel

_LATENT_SETTINGS = (
    "num_latents_value",
    "num_cross_heads",
    "output_normalize",
    "hidden_dim",
    "latent_dim",
    "cross_dim_head",
)


def load_nv_embed_state(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[MistralModel, LatentAttention]:
    """The two halves of a published checkpoint: a bidirectional Mistral and its pooling, both in eval mode.

    Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models" (arXiv 2405.17428).
    A ``sliding_window`` in the settings is taken off, as the official attention mask ignores it.

    Args:
        state_dict: keys ``embedding_model.*`` and ``latent_attention_model.*``.
        config: ``{"text": ..., "latent": ...}``, or the published names ``text_config``, ``latent_attention_config``.

    Raises:
        ValueError: keys or settings that are missing, left over or do not fit together.
    """
    from transformers import MistralConfig, MistralModel

    parts: dict[str, dict[str, Tensor]] = {"embedding_model": {}, "latent_attention_model": {}}
    for key, value in state_dict.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise ValueError(f"expected keys embedding_model.* and latent_attention_model.*, got {key!r}")
        parts[part][rest] = value
    text = config.get("text", config.get("text_config"))
    latent = config.get("latent", config.get("latent_attention_config"))
    if text is None or latent is None:
        raise ValueError(
            f"config needs text (text_config) and latent (latent_attention_config), got {', '.join(sorted(config))}"
        )
    pooling = LatentAttention.from_reference(
        parts["latent_attention_model"], **{key: value for key, value in latent.items() if key in _LATENT_SETTINGS}
    )
    # Built without storage, so that no weights are drawn only to be overwritten.
    with torch.device("meta"):
        model = MistralModel(MistralConfig(**{key: value for key, value in text.items() if key != "model_type"}))
    try:
        model.load_state_dict({key: value.clone() for key, value in parts["embedding_model"].items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the text settings: {error}") from None
    # The rotary table is computed from the settings and in no checkpoint.
    model.rotary_emb = type(model.rotary_emb)(model.config).to(model.device)
    return make_bidirectional(model).eval(), pooling.eval()
