"""A running mean of values whose softmax weights come from the keys alone.

With one logit a token, ``o_i = sum_{j<=i} exp(l_j) v_j / sum_{m<=i} exp(l_m)``: no query takes part, so the past is
summed up by a numerator, a denominator and the largest logit so far, whatever its length. The *Non-approximate* variant
of "Deconstructing Attention" (arXiv 2510.11602), where ``l_j = silu(W_q x_j).(W_k x_j) / sqrt(head_dim)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.masked import widen
from cenote.ops.precision import full_precision


class KeySoftmaxState(NamedTuple):
    """What the past amounts to, float32 or better: the largest logit m ``(batch, heads)``, ``sum exp(l - m)`` of the
    same shape and ``sum exp(l - m) v`` ``(batch, heads, width)``."""

    largest: Tensor
    denominator: Tensor
    numerator: Tensor


def key_logits(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens"]:
    """``l_j = scale * q_j.k_j``, each token's query with its own key; float32 or better.

    A rotation of both by the token's position would cancel, so there is nothing for rotary positions to do.
    ``scale`` is ``head_dim ** -0.5`` by default. The paper's queries have passed a SiLU.
    """
    return (widen(query) * widen(key)).sum(dim=-1) * (query.shape[-1] ** -0.5 if scale is None else scale)


def key_softmax_weights(
    logits: Float[Tensor, "batch heads tokens"], mask: Bool[Tensor, "batch tokens"] | None = None, causal: bool = True
) -> Float[Tensor, "batch heads tokens tokens"]:
    """The map: row i is the softmax of the logits of real tokens (up to i if ``causal``).

    A padded token's row also sees the token itself, so that no row is empty.
    """
    tokens = logits.shape[-1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=logits.device)
    seen = seen.tril() if causal else seen
    if mask is not None:
        seen = seen & mask[:, None, None] | torch.eye(tokens, dtype=torch.bool, device=logits.device)
    return widen(logits)[:, :, None].expand(-1, -1, tokens, -1).masked_fill(~seen, float("-inf")).softmax(dim=-1)


def initial_key_softmax_state(value: Float[Tensor, "batch heads tokens width"]) -> KeySoftmaxState:
    """The state of an empty past for values like these."""
    zeros = widen(value).new_zeros
    batch, heads, _, width = value.shape
    lowest = torch.finfo(widen(value).dtype).min
    return KeySoftmaxState(zeros(batch, heads) + lowest, zeros(batch, heads), zeros(batch, heads, width))


def key_softmax_chunk(
    logits: Float[Tensor, "batch heads tokens"],
    value: Float[Tensor, "batch heads tokens width"],
    state: KeySoftmaxState | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    block: int = 64,
) -> tuple[Float[Tensor, "batch heads tokens width"], KeySoftmaxState]:
    """The running mean over a stretch of tokens and the past before it; also gives the state after it.

    The stretch is taken ``block`` tokens at a time, each against the largest logit up to it, so that no exponential
    overflows however large the logits are. Time and memory grow linearly with the tokens.

    Args:
        mask: real tokens; padding has weight 0. A token that sees no real one comes out as 0.

    Raises:
        ValueError: a block below 1.
    """
    if block < 1:
        raise ValueError(f"a block has at least one token, got {block}")
    largest, denominator, numerator = initial_key_softmax_state(value) if state is None else state
    mixed = []
    for start in range(0, value.shape[2], block):
        part = slice(start, start + block)
        scores, values = widen(logits[:, :, part]).to(numerator.dtype), widen(value[:, :, part])
        seen = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool, device=value.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, part], torch.finfo(scores.dtype).min)
            seen = seen & mask[:, None, None, part]
        # The result does not depend on what is subtracted, so no gradient needs to pass through the maximum.
        running = torch.maximum(scores.detach().cummax(dim=-1).values, largest[..., None])
        gap = (scores[:, :, None] - running[..., None]).masked_fill(~seen, float("-inf"))
        weights = gap.exp()
        kept = (largest[..., None] - running).exp()
        with full_precision(values):
            sums = weights @ values + kept[..., None] * numerator[:, :, None]
        total = weights.sum(dim=-1) + kept * denominator[..., None]
        mixed.append(sums / total.masked_fill(total == 0, 1.0)[..., None])
        largest, denominator, numerator = running[..., -1], total[..., -1], sums[:, :, -1]
    return torch.cat(mixed, dim=2).to(value.dtype), KeySoftmaxState(largest, denominator, numerator)
