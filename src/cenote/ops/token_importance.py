"""How much each calibration token matters: raw scores, and their way to weights.

Scores are ``(batch, tokens)``; padding is told by ``mask`` and neither counts nor is scored (0). The rules are those of
RSQ (arXiv 2503.01820).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scores = Float[Tensor, "batch tokens"]
Power = Literal["none", "square", "sqrt"]
Position = Literal["none", "count", "sqrt"]


def attention_received(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    scaling: float | None = None,
    visible: Callable[[int, int], Bool[Tensor, "batch 1 rows tokens"]] | None = None,
    block: int | None = None,
) -> Scores:
    """``s_j = sum_h sum_i softmax_j(q_hi k_hj scaling)`` over causal attention, a block of queries at a time.

    The scores of a sequence sum to heads times its real tokens. Beside
    :func:`cenote.ops.attention_statistics.attention_received`, this one sums over heads, knows windows, and leaves out
    the keys behind a block, which is half of all work in a calibration that sees every layer's maps.

    Args:
        query: behind rotary positions.
        key: likewise; heads of queries share those of keys in runs.
        mask: real tokens. Padding asks nothing and receives nothing.
        scaling: of the logits; ``head_dim ** -0.5`` by default.
        visible: ``visible(first, last)`` says which keys the queries ``first .. last - 1`` see, where that is not every
            real token up to themselves (a sliding window, say).
        block: queries at a time; maps of ``batch x heads x block x tokens`` are all that is held. By default about a
            million entries of them.
    """
    batch, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    received = torch.zeros(batch, tokens, device=query.device)
    query = query.float().unflatten(1, (kv_heads, heads // kv_heads)) * (width**-0.5 if scaling is None else scaling)
    keys = key.float().unsqueeze(2).mT
    places = torch.arange(tokens, device=query.device)
    block = block or min(max(2**20 // (batch * heads * tokens), 16), 256)
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        weights = query[:, :, :, first:last] @ keys[..., :last]
        if visible is not None:
            weights.masked_fill_(~visible(first, last)[:, None, :, :, :last], -torch.inf)
        else:  # keys in front of the block are seen by all of it
            weights[..., first:].masked_fill_(places[first:last, None] < places[first:last], -torch.inf)
            if mask is not None:
                weights.masked_fill_(~mask[:, None, None, None, :last], -torch.inf)
        weights = weights.softmax(-1)
        if mask is not None:  # padding may see nothing at all, which is NaN
            weights = weights.masked_fill(~mask[:, None, None, first:last, None], 0)
        received[:, :last] += weights.flatten(1, 3).sum(1)
    return received if mask is None else received.masked_fill(~mask, 0)


def attention_concentration(
    received: Scores,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    power: Power = "none",
    position: Position = "none",
) -> Scores:
    """Attention received, raised, then divided by the number of queries that could have given it (or its root)."""
    received = received.square() if power == "square" else received.sqrt() if power == "sqrt" else received
    if position != "none":
        real = torch.ones_like(received) if mask is None else mask.to(received.dtype)
        later = real.flip(1).cumsum(1).flip(1).clamp(min=1)
        received = received / (later if position == "count" else later.sqrt())
    return received


def activation_norm(x: Float[Tensor, "batch tokens dim"]) -> Scores:
    """``|x_j|``."""
    return x.float().norm(dim=-1)


def activation_difference(x: Float[Tensor, "batch tokens dim"], y: Float[Tensor, "batch tokens dim"]) -> Scores:
    """``-|x_j - y_j|``: tokens matter that a layer leaves as they are."""
    return -(x.float() - y.float()).norm(dim=-1)


def token_distance(x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None) -> Scores:
    """``mean_i |x_j - x_i|^2``, as ``|x_j - m|^2 + mean_i |x_i - m|^2`` around the mean ``m``: no pairs are formed."""
    real = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.float()
    share = real / real.sum(1, keepdim=True)
    mean = torch.einsum("bt,btd->bd", share, x.float())
    square = (x.float() - mean[:, None]).square().sum(-1)
    return square + (share * square).sum(1, keepdim=True)


def token_rarity(ids: Int[Tensor, "batch tokens"], counts: Int[Tensor, "symbols"]) -> Scores:
    """``-(count of the token's id)``: ``counts`` holds how often each id occurs in the calibration set."""
    return -counts[ids].float()


def chunk_weights(rule: str, tokens: int) -> Float[Tensor, "tokens"]:
    """Weights 1 and 0 by position.

    - ``"a_b_..._n"``: 1 on the chunks a, b, ... of n chunks of ``floor(tokens / n)``; tokens behind them have 0;
    - ``"first_half"``: 1 on the second half, ``"second_half"``: 1 on the first (they name what is left out);
    - ``"first_N"`` with a number N: 1 on the first N tokens.

    Raises:
        ValueError: another rule, or one that leaves no token.
    """
    weights = torch.zeros(tokens)
    if rule in ("first_half", "second_half"):
        weights[tokens // 2 :] = 1
        weights = weights if rule == "first_half" else 1 - weights
    elif rule.startswith("first_") and rule[6:].isdecimal():
        weights[: int(rule[6:])] = 1
    elif len(parts := rule.split("_")) > 1 and all(part.isdecimal() for part in parts):
        *chosen, count = map(int, parts)
        if not count or any(chunk >= count for chunk in chosen):
            raise ValueError(f"chunk rule {rule!r} names chunks beyond 0..{count - 1}")
        size = tokens // count
        for chunk in chosen:
            weights[chunk * size : (chunk + 1) * size] = 1
    else:
        raise ValueError(f"expected a rule such as '0_1_8', 'first_half', 'second_half' or 'first_128', got {rule!r}")
    if not bool(weights.any()):
        raise ValueError(f"chunk rule {rule!r} leaves none of {tokens} tokens")
    return weights


def is_chunk_rule(rule: str) -> bool:
    """Whether :func:`chunk_weights` reads the rule."""
    return rule in ("first_half", "second_half") or rule.removeprefix("first_").replace("_", "").isdecimal()


def scale_importance(
    scores: Scores,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    r_min: float = 0.005,
    r_max: float = 1.0,
    *,
    quantile: float | None = None,
    bins: int | None = None,
    truncate: float = 0.0,
) -> Scores:
    """Scores to weights: ``w = (s - min) / (max - min) (r_max - r_min) + r_min`` over the real tokens of each sequence.

    Sequences whose scores are all equal get weight 1 everywhere; padding gets 0.

    Args:
        scores: any finite numbers.
        mask: real tokens.
        r_min: weight of the least important token.
        r_max: weight of the most important one.
        quantile: use the quantiles ``1 - quantile`` and ``quantile`` in place of minimum and maximum, and clip to them.
        bins: round weights to this many evenly spaced values from ``r_min`` to ``r_max``.
        truncate: this share of each sequence's tokens, those of the lowest scores, gets weight 0.

    Raises:
        ValueError: scores that are no numbers, or settings out of range.
    """
    check_range(r_min, r_max, quantile, bins, truncate)
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if not bool(scores[real].isfinite().all()):
        raise ValueError("importance scores must be finite, got NaN or infinite ones")
    scores = scores.float()
    if quantile is None:
        low = scores.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        high = scores.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    else:
        kept = scores.masked_fill(~real, torch.nan)
        low, high = (kept.nanquantile(q, dim=1, keepdim=True) for q in (1 - quantile, quantile))
    span = high - low
    share = ((scores - low) / torch.where(span > 0, span, 1)).clamp(0, 1)
    if bins is not None:
        share = torch.round(share * (bins - 1)) / (bins - 1)
    weights = share * (r_max - r_min) + r_min
    if truncate:
        order = scores.masked_fill(~real, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        weights = weights.masked_fill(order < torch.floor(truncate * real.sum(1, keepdim=True)), 0)
    return torch.where(span > 0, weights, 1.0).masked_fill(~real, 0)


def check_range(r_min: float, r_max: float, quantile: float | None, bins: int | None, truncate: float) -> None:
    """Raise if the settings of :func:`scale_importance` are out of range."""
    if not 0 <= r_min <= r_max or r_max <= 0:
        raise ValueError(f"expected 0 <= r_min <= r_max and r_max above 0, got r_min={r_min}, r_max={r_max}")
    if quantile is not None and not 0.5 < quantile <= 1:
        raise ValueError(f"quantile must be above 0.5 and at most 1, got {quantile}")
    if bins is not None and bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    if not 0 <= truncate < 1:
        raise ValueError(f"truncate must be at least 0 and below 1, got {truncate}")


def expand_sequences(
    ids: Int[Tensor, "batch tokens"], copies: int, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Int[Tensor, "more tokens"]:
    """Each sequence ``copies`` times, copy ``r`` rolled right by ``r floor(length / copies)`` of its real tokens.

    Early positions attract attention whatever stands there; rolled copies let varied tokens stand there. Copies of one
    sequence follow each other; padding stays where it is.

    Raises:
        ValueError: fewer than one copy, or more copies than real tokens.
    """
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    if copies < 1 or copies > min(lengths):
        raise ValueError(f"copies must be from 1 to the {min(lengths)} tokens of the shortest sequence, got {copies}")
    rows = []
    for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        real = slice(None) if mask is None else mask[number]
        for copy in range(copies):
            rolled = row.clone()
            rolled[real] = row[real].roll(copy * (length // copies))
            rows.append(rolled)
    return torch.stack(rows)
