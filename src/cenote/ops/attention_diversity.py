"""How alike the rows of attention maps are: the attention diversification loss, and the plain similarity beside it.

Everything starts from the mean map over heads. From stored maps that is one reduction; from queries and keys it is
made again, block by block, whenever it is needed, so that no map of a single head is ever whole and nothing but
queries and keys is kept for the backward pass (short sequences are spared the trouble).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cenote.ops.masked import masked_mean, widen, zero_padding

BLOCK = 64
"""Queries whose maps are made at a time; a layer of no more tokens is small enough to be made once and kept."""
LAYER_EPS = 1e-6
"""Added to the number of layers that the loss divides by, as the official code does."""


class QueryKey(NamedTuple):
    """What the attention map of a layer is made of, ``softmax(scale * Q K^T + bias)``.

    Attributes:
        query, key: ``(batch, heads, tokens, head_dim)``.
        scale: factor of the products; ``None`` for ``head_dim ** -0.5``.
        bias: added to the logits (a host's additive mask, relative positions), anything that broadcasts to
            ``(batch, heads, tokens, tokens)``; ``None`` for none.
    """

    query: Tensor
    key: Tensor
    scale: float | None = None
    bias: Tensor | None = None


def row_similarity(
    mean_map: Float[Tensor, "batch tokens tokens"],
    threshold: float | None = 2.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch"]:
    """Mean cosine between the rows of a map and the mean of its rows, each behind a hard gate; one value an item.

    With ``m = mean_i M_i`` and N tokens, ``M' = M [M > threshold / N]`` and ``m' = m [m > threshold / N]``:
    ``mean_i cos(m', M'_i)``. What the gates let through keeps its value and its gradient; a row that is gated out
    counts 0. With non-negative maps the value lies in [0, 1]. It is 0, without gradient, for uniform attention and
    wherever no token receives ``threshold / N`` on average: it measures shared sinks. ``threshold=None`` leaves the
    gates out and measures similarity at large.

    Args:
        mean_map: attention averaged over heads; rows are queries and sum to 1.
        threshold: in multiples of uniform attention.
        mask: ``True`` for a real token: padding is neither a row nor counted in N.

    Raises:
        ValueError: a threshold that is not between 0 and the number of tokens, where nothing passes the gates.
    """
    tokens = mean_map.shape[-1]
    if threshold is not None and not 0 < threshold < tokens:
        raise ValueError(f"threshold must lie between 0 and the number of tokens, {tokens}, got {threshold}")
    rows = zero_padding(widen(mean_map), mask)
    mean = masked_mean(rows, mask).unsqueeze(1)
    if threshold is not None:
        count = tokens if mask is None else mask.sum(dim=1).view(-1, 1, 1)
        rows, mean = (torch.where(x > threshold / count, x, 0.0) for x in (rows, mean))
    return masked_mean(F.cosine_similarity(mean, rows, dim=-1), mask)


def head_mean_map(layer: QueryKey, block: int = BLOCK) -> Float[Tensor, "batch tokens tokens"]:
    """``mean_h softmax(scale * Q_h K_h^T + bias_h)``, ``block`` queries at a time.

    Largest at any moment: the result, and ``(batch, heads, block, tokens)``. Autograd keeps queries and keys and makes
    each block once more on the way back, unless there is but one.
    """
    query, key, scale, bias = layer
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = query.shape[-2]

    def piece(part: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        logits = widen(part * scale) @ widen(key).transpose(-1, -2)
        return (logits if bias is None else logits + bias).softmax(dim=-1).mean(dim=1)

    if tokens <= block:
        return piece(query, key, bias)

    def rows(start: int) -> Tensor:
        own = bias
        if bias is not None and bias.ndim >= 2 and bias.shape[-2] == tokens:
            own = bias[..., start : start + block, :]
        return checkpoint(
            piece, query[..., start : start + block, :], key, own, use_reentrant=False, preserve_rng_state=False
        )

    return torch.cat([rows(start) for start in range(0, tokens, block)], dim=1)


def attention_diversification_loss(
    layers: Sequence[Tensor | QueryKey | None],
    threshold: float = 2.0,
    *,
    on: Literal["attention", "features"] = "attention",
    mask: Bool[Tensor, "batch tokens"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
    check_rows: bool = True,
) -> Float[Tensor, "*batch"]:
    """ADL: ``sum_l s_l / (L + 1e-6)`` with the :func:`row_similarity` ``s_l`` of each of L layers.

    Source: "Robustifying Token Attention for Vision Transformers" (arXiv 2303.11126). Unlike the official code an item
    counts the same alone and in a batch: there the axis of a batch of one is squeezed away and the loss is 0.

    Args:
        layers: attention maps behind their softmax, ``(batch, heads, tokens, tokens)``, or :class:`QueryKey`, whose
            maps are never stored (dropout on attention is then not seen). Layers may differ in tokens. With
            ``on="features"`` token features ``(batch, tokens, dim)``.
        threshold: of the gates, in multiples of uniform attention.
        on: ``"features"`` compares each token's features with their mean over tokens, without gates: the loss that
            FluxSR (ICML 2025) calls by the same name.
        mask: ``True`` for a real token, where all layers have the same ones. That padding is not attended to is the
            business of the maps, or of the ``bias`` of a :class:`QueryKey`.
        reduction: ``"none"`` gives one value an item.
        check_rows: refuse maps whose rows do not sum to 1; switch off for maps behind attention dropout.

    Raises:
        TypeError: no map, as fused attention leaves it.
        ValueError: no layer, maps that are not square, rows that do not sum to 1 within 1e-3 (or the precision of
            their dtype), a threshold outside of (0, tokens), an unknown ``on`` or ``reduction``.
    """
    return _over_layers(layers, threshold, on, mask, reduction, check_rows) / (len(layers) + LAYER_EPS)


def attention_similarity(
    layers: Sequence[Tensor | QueryKey | None],
    *,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
    check_rows: bool = True,
) -> Float[Tensor, "*batch"]:
    """Mean over layers of the cosine between attention rows and their mean, without gates; in (0, 1].

    To be read beside the loss, which is 0 both for diverse and for uniform attention: uniform attention gives 1 here.
    Arguments and errors as :func:`attention_diversification_loss`.
    """
    return _over_layers(layers, None, "attention", mask, reduction, check_rows) / len(layers)


def _over_layers(
    layers: Sequence[Tensor | QueryKey | None],
    threshold: float | None,
    on: str,
    mask: Tensor | None,
    reduction: str,
    check_rows: bool,
) -> Tensor:
    """Sum of the layers' similarities."""
    if on not in ("attention", "features") or reduction not in ("mean", "none"):
        raise ValueError(
            f"expected on='attention' or 'features' and reduction='mean' or 'none', got {on!r}, {reduction!r}"
        )
    if len(layers) == 0:
        raise ValueError("expected attention maps of at least one layer, got none")
    if on == "features":
        items = torch.stack([_feature_similarity(layer, mask) for layer in layers]).sum(dim=0)
    else:
        items = torch.stack([_layer(layer, threshold, mask, check_rows) for layer in layers]).sum(dim=0)
    return items if reduction == "none" else items.mean()


def _layer(
    layer: Tensor | QueryKey | None, threshold: float | None, mask: Tensor | None, check_rows: bool
) -> Float[Tensor, "batch"]:
    if layer is None:
        raise TypeError("attention maps needed: use the eager path, fused attention gives none (or pass QueryKey)")
    if isinstance(layer, Tensor):
        if layer.ndim != 4 or layer.shape[2] != layer.shape[3]:
            raise ValueError(f"expected self-attention maps (batch, heads, tokens, tokens), got {tuple(layer.shape)}")
        if check_rows:
            _require_rows(layer)
        return row_similarity(widen(layer).mean(dim=1), threshold, mask)
    query, key, scale, bias = layer
    if query.ndim != 4 or query.shape != key.shape:
        raise ValueError(
            f"expected queries and keys (batch, heads, tokens, head_dim), got {tuple(query.shape)}, {tuple(key.shape)}"
        )

    if query.shape[2] <= BLOCK:
        return row_similarity(head_mean_map(layer), threshold, mask)

    # Of a whole layer autograd keeps nothing but these arguments, so only one layer's mean map is there at a time.
    def value(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        return row_similarity(head_mean_map(QueryKey(query, key, scale, bias)), threshold, mask)

    return checkpoint(value, query, key, bias, use_reentrant=False, preserve_rng_state=False)


def _require_rows(maps: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    away = float((maps.detach().sum(dim=-1, dtype=torch.float32) - 1).abs().max())
    # Rounded to bfloat16 a softmax is further from 1 than that.
    if not away <= max(1e-3, torch.finfo(maps.dtype).eps):  # NaN too
        raise ValueError(f"rows of an attention map sum to 1, but one is {away:.3g} away (logits? attention dropout?)")


def _feature_similarity(features: Tensor | QueryKey | None, mask: Tensor | None) -> Float[Tensor, "batch"]:
    if not isinstance(features, Tensor) or features.ndim != 3:
        shape = tuple(getattr(features, "shape", ()))
        raise ValueError(f"expected token features (batch, tokens, dim), got {type(features).__name__} {shape}")
    rows = zero_padding(widen(features), mask)
    return masked_mean(F.cosine_similarity(masked_mean(rows, mask).unsqueeze(1), rows, dim=-1), mask)
