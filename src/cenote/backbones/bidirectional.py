"""Decoders that look both ways, and the masks that keep an instruction out of the pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)

SUPPORTED = ("gemma", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Model types whose full-attention layers are known to become bidirectional by the configuration alone."""


def make_bidirectional(model: ModelT) -> ModelT:
    """Turn a transformers decoder into a bidirectional encoder, in place: every token sees every real token.

    Only padding stays masked, under eager and under sdpa attention. Sliding windows are taken off too, since
    with ``is_causal = False`` transformers would make a two-sided window of them. The change is in the configuration,
    so that a saved model is bidirectional when it is loaded again. There is nothing to train; an untuned causal model
    usually embeds worse this way. Sources: NV-Embed (arXiv 2405.17428), "Pooling And Attention" (arXiv 2409.02727).

    Args:
        model: a decoder, with or without its language-model head.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model type outside :data:`SUPPORTED`, or one with layers other than full and sliding-window
            attention.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    if config.model_type not in SUPPORTED:
        raise ValueError(f"bidirectional attention is known for {', '.join(SUPPORTED)}, got {config.model_type}")
    kinds = list(getattr(config, "layer_types", None) or [])
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"expected layers of full or sliding-window attention, got {sorted(set(kinds))}")
    config.is_causal = False
    if kinds:
        config.layer_types = ["full_attention"] * len(kinds)
    for name, value in {"sliding_window": None, "use_sliding_window": False}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for module in model.modules():
        # What layers copied from the configuration when they were built.
        copied = vars(module)
        if copied.get("is_causal") is True:
            copied["is_causal"] = False
        if copied.get("has_sliding_layers") is True:
            copied["has_sliding_layers"] = False
        if "sliding_window" in copied:
            copied["sliding_window"] = None
        for name in ("layer_type", "attention_type"):
            if copied.get(name) == "sliding_attention":
                copied[name] = "full_attention"
    return model


def instruction_mask(
    attention_mask: Tensor,
    lengths: int | Sequence[int] | Tensor,
    *,
    exact: bool = True,
    bos: bool = True,
) -> Bool[Tensor, "batch tokens"]:
    """Pool mask: the real tokens behind the instruction. Padding may be on either side.

    Args:
        attention_mask: ``(batch, tokens)``, 1 or ``True`` for a real token.
        lengths: tokens of each row's instruction, counted without the begin-of-sequence token; 0 leaves the row whole.
        exact: leave out the begin-of-sequence token and the whole instruction. ``False`` leaves out as many tokens
            from the start as the instruction is long, begin-of-sequence included, so that the last instruction token
            is averaged in: this is how the published NV-Embed weights were trained and are used.
        bos: whether rows start with a begin-of-sequence token.

    Raises:
        ValueError: a mask that is not ``(batch, tokens)``, lengths that do not match or are negative, a row with
            nothing left to pool (the text was cut off within its instruction; officially such a row is NaN).
    """
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be (batch, tokens), got shape {tuple(attention_mask.shape)}")
    rows = attention_mask.shape[0]
    drop = torch.as_tensor(lengths, device=attention_mask.device)
    if drop.is_floating_point() or drop.ndim > 1 or (drop.ndim == 1 and len(drop) != rows):
        raise ValueError(f"lengths must be a whole number or one for each of {rows} rows, got {lengths}")
    if bool((drop < 0).any()):
        raise ValueError(f"lengths must not be negative, got {lengths}")
    if exact and bos:
        drop = torch.where(drop > 0, drop + 1, drop)
    real = attention_mask.bool()
    keep = real & (real.long().cumsum(dim=1) > drop.expand(rows)[:, None])
    if not bool(keep.any(dim=1).all()):
        empty = (~keep.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"no token is left to pool behind the instruction in row(s) {empty[:10]}")
    return keep
