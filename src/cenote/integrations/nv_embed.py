"""The published NV-Embed layout: which weights it has, and the two networks they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cenote.backbones.bidirectional import make_bidirectional
from cenote.pooling.cross_block import reference_names
from cenote.pooling.latent_attention import LatentAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOST, HEAD = "embedding_model", "latent_attention_model"
LATENT_DEFAULTS = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "output_normalize": True,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "cross_dim_head": 4096,
}
"""Settings of the released pooling, which a configuration may leave out."""

# Settings that say where a text configuration was, not what it is.
_ELSEWHERE = ("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype",
              "_attn_implementation", "model_type")  # fmt: skip


def load_nv_embed_state(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[PreTrainedModel, LatentAttention]:
    """The two halves of a published checkpoint: a bidirectional decoder and its pooling, both in eval mode.

    The weights are copied, so that training the result leaves ``state_dict`` alone. See :func:`assemble`.
    """
    return assemble(((key, value.clone()) for key, value in state_dict.items()), config)


def assemble(
    weights: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]
) -> tuple[PreTrainedModel, LatentAttention]:
    """Build both networks without storage and give them their weights as these come, one at a time.

    Source: "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models" (arXiv 2405.17428).
    A ``sliding_window`` in the settings is taken off, as the official attention mask ignores it. The host is Mistral
    unless its settings have another ``model_type`` of :data:`cenote.backbones.bidirectional.SUPPORTED`.

    Args:
        weights: names ``embedding_model.*`` and ``latent_attention_model.*``, and tensors, which are kept.
        config: ``{"text": ..., "latent": ...}``, or the published names ``text_config``, ``latent_attention_config``.

    Raises:
        ValueError: keys or settings that are missing, left over or do not fit together.
    """
    from transformers import AutoConfig, AutoModel

    text = config.get("text", config.get("text_config"))
    latent = config.get("latent", config.get("latent_attention_config"))
    if text is None or latent is None:
        raise ValueError(
            f"config needs text (text_config) and latent (latent_attention_config), got {', '.join(sorted(config))}"
        )
    kind = str(text.get("model_type", "mistral")).removeprefix("bidir_")
    # Without storage, so that no weights are drawn only to be overwritten.
    with torch.device("meta"):
        settings = {key: value for key, value in text.items() if key not in _ELSEWHERE}
        model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
        pooling = _head(latent)
    make_bidirectional(model)
    names = reference_names()
    missing = {f"{HOST}.{name}" for name in model.state_dict()} | {f"{HEAD}.{name}" for name in names}
    for key, value in weights:
        if key not in missing:
            raise ValueError(
                f"expected keys {HOST}.* and {HEAD}.* of {kind}, each once, got {key!r}: the weights do not fit the "
                "text settings or are none of NV-Embed"
            )
        missing.remove(key)
        part, _, rest = key.partition(".")
        if part == HOST:
            _assign(model, rest, key, value)
        else:
            _assign(pooling, names[rest], key, value)
    if missing:
        few = ", ".join(sorted(missing)[:5])
        raise ValueError(f"{len(missing)} weights are missing, so they do not fit the text settings: {few}")
    # The rotary table is computed from the settings and in no checkpoint.
    model.rotary_emb = type(model.rotary_emb)(model.config).to(model.device)
    return model.eval(), pooling.eval()


def _head(latent: Mapping[str, Any]) -> LatentAttention:
    sizes = {**LATENT_DEFAULTS, **{key: value for key, value in latent.items() if key in LATENT_DEFAULTS}}
    if sizes["latent_dim"] != sizes["hidden_dim"]:
        raise ValueError(f"latent_dim must equal hidden_dim, got {sizes['latent_dim']} and {sizes['hidden_dim']}")
    return LatentAttention(
        sizes["hidden_dim"], sizes["num_latents_value"], sizes["num_cross_heads"], sizes["cross_dim_head"],
        sizes["output_normalize"],
    )  # fmt: skip


def _assign(module: nn.Module, name: str, key: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    expected = getattr(owner, leaf)
    if expected.shape != value.shape:
        shapes = f"{key} should be {tuple(expected.shape)}, got {tuple(value.shape)}"
        raise ValueError(f"the weights do not fit the text settings: {shapes}")
    setattr(owner, leaf, nn.Parameter(value))
