"""Attention whose exponential is replaced by its second-order Taylor polynomial, in quadratic and in linear time.

``softmax`` weights ``exp(s)`` become ``1 + s + s^2 / 2`` with ``s = scale * q.k``. The polynomial is an inner product
``phi(q).phi(k)`` of finite features, so that a sum over the past is a matrix of fixed size: the state of a recurrence.
As in Based (Arora et al. 2024) and the *Approximate* variant of "Deconstructing Attention" (arXiv 2510.11602).

Two forms: ``"joint"`` is the polynomial itself, at least 1/2 and therefore always a proper weight; ``"diagonal"`` keeps
only the squares ``q_i^2 k_i^2`` of the second order, so that the features grow with the head width instead of its
square. The diagonal form's weights are not bounded below by 0 (they can fall to ``1 - head_dim / 2``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import widen
from cenote.ops.precision import full_precision

TaylorForm = Literal["joint", "diagonal"]


class TaylorState(NamedTuple):
    """What the past amounts to: ``sum phi(k) v^T`` ``(batch, heads, features, width)`` and ``sum phi(k)``
    ``(batch, heads, features)``, float32 or better."""

    numerator: Tensor
    denominator: Tensor


def taylor_weights(scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``1 + s + s^2 / 2``, which differs from ``exp(s)`` by about ``s^3 / 6`` and is nowhere below 1/2."""
    return 1 + scores + scores.square() / 2


def num_taylor_features(head_dim: int, form: TaylorForm = "joint") -> int:
    """Length of :func:`taylor_features`: ``1 + d + d (d + 1) / 2`` joint, ``1 + 2 d`` diagonal."""
    _check(form)
    return 1 + head_dim + (head_dim * (head_dim + 1) // 2 if form == "joint" else head_dim)


def taylor_features(
    x: Float[Tensor, "*batch head_dim"], form: TaylorForm = "joint"
) -> Float[Tensor, "*batch features"]:
    """Features whose inner product is the weight.

    ``[1, x, x_i^2 / sqrt(2), x_i x_j (i < j)]``, without the mixed products in the diagonal form. Each mixed product
    stands once, which halves the features of the plain outer product.
    """
    _check(form)
    parts = [torch.ones_like(x[..., :1]), x, x.square() * 0.5**0.5]
    if form == "joint":
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1, device=x.device)
        parts.append(x[..., first] * x[..., second])
    return torch.cat(parts, dim=-1)


def taylor_attention_weights(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    form: TaylorForm = "joint",
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Weights before they are normalised, 0 on padding and, if ``causal``, on later tokens; see
    :func:`taylor_attention`."""
    _check(form)
    query, key = widen(query) * (query.shape[-1] ** -0.5 if scale is None else scale), widen(key)
    with full_precision(query):  # squares of scores leave the range of float16
        weights = (
            taylor_weights(query @ key.transpose(-1, -2))
            if form == "joint"
            else taylor_features(query, form) @ taylor_features(key, form).transpose(-1, -2)
        )
    if causal:
        weights = weights.tril(key.shape[2] - query.shape[2])
    return weights if mask is None else weights.masked_fill(~mask[:, None, None], 0.0)


def taylor_attention_map(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = True,
    form: TaylorForm = "joint",
    eps: float = 0.0,
) -> Float[Tensor, "batch heads queries keys"]:
    """The weights over their sum: rows that sum to 1, or to 0 for a query that sees no real token."""
    weights = taylor_attention_weights(query, key, mask, causal=causal, form=form)
    return _divide(weights, weights.sum(dim=-1), eps)


def taylor_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    causal: bool = True,
    form: TaylorForm = "joint",
    scale: float | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "batch heads tokens width"]:
    """``o_i = sum_j w_ij v_j / (sum_j w_ij + eps)`` over the real tokens j (up to i if ``causal``), from the whole map.

    Costs ``tokens^2``; :func:`taylor_attention_chunk` gives the same numbers in linear time.

    Args:
        mask: real tokens; ``None`` for all. A query that sees none comes out as 0.
        form: ``"joint"`` for ``w = 1 + s + s^2/2``, ``"diagonal"`` for ``1 + s + sum_i (scale q_i k_i)^2 / 2``.
        scale: of ``s = scale * q.k``; ``head_dim ** -0.5`` by default.
        eps: added to the normaliser.

    Raises:
        ValueError: an unknown form.
    """
    weights = taylor_attention_weights(query, key, mask, causal=causal, form=form, scale=scale)
    with full_precision(value):
        return _divide(weights @ widen(value), weights.sum(dim=-1), eps).to(value.dtype)


def initial_taylor_state(
    like: Float[Tensor, "batch heads tokens head_dim"], width: int, form: TaylorForm = "joint"
) -> TaylorState:
    """The state of an empty past for keys like these and values of this width."""
    shape = (*like.shape[:2], num_taylor_features(like.shape[-1], form))
    zeros = widen(like).new_zeros
    return TaylorState(zeros(*shape, width), zeros(shape))


def taylor_attention_chunk(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens width"],
    state: TaylorState | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    form: TaylorForm = "joint",
    scale: float | None = None,
    eps: float = 0.0,
    block: int = 64,
) -> tuple[Float[Tensor, "batch heads tokens width"], TaylorState]:
    """Causal :func:`taylor_attention` over a stretch of tokens and the past before it; also gives the state after it.

    The stretch is taken ``block`` tokens at a time: within a block from the map, what came before from the state. Time
    and memory grow linearly with the tokens.

    Raises:
        ValueError: an unknown form, or a block below 1.
    """
    if block < 1:
        raise ValueError(f"a block has at least one token, got {block}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    numerator, denominator = initial_taylor_state(key, value.shape[-1], form) if state is None else state
    mixed = []
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        q, k, v = (widen(x[:, :, part]) for x in (query, key, value))
        real = None if mask is None else mask[:, part]
        within = taylor_attention_weights(q, k, real, form=form, scale=scale)
        asked, shown = taylor_features(q * scale, form), taylor_features(k, form)
        if real is not None:
            shown = shown.masked_fill(~real[:, None, :, None], 0.0)
        with full_precision(v):
            total = within.sum(dim=-1) + (asked @ denominator[..., None])[..., 0]
            mixed.append(_divide(within @ v + asked @ numerator, total, eps))
            numerator = numerator + shown.transpose(-1, -2) @ v
            denominator = denominator + shown.sum(dim=2)
    return torch.cat(mixed, dim=2).to(value.dtype), TaylorState(numerator, denominator)


def _divide(sums: Tensor, total: Tensor, eps: float) -> Tensor:
    """Weighted sums over their weights; a query that saw nothing has both 0 and stays 0."""
    total = total + eps
    return sums / total.masked_fill(total == 0, 1.0)[..., None]


def _check(form: str) -> None:
    if form not in ("joint", "diagonal"):
        raise ValueError(f"form must be 'joint' or 'diagonal', got {form!r}")
