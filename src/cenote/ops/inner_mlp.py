"""A small network that is trained while the sequence is read: its weights are the state (TTT-MLP, Titans).

The network ``f(x) = gelu(x W_1) W_2`` is fitted to the pairs by gradient steps on ``||f(k_i) - v_i||^2 / 2``. The
gradient of one pair is an outer product for either matrix, so the network after any token of a mini-batch acts like
attention among the mini-batch's own keys behind the weights before it, and no weights of single tokens are held.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.ops.chunks import decays
from cenote.ops.gates import LOG_DECAY, STEP, check_pairs


class Weights(NamedTuple):
    """``W_1`` ``(batch, heads, key_dim, hidden)`` and ``W_2`` ``(batch, heads, hidden, value_dim)``, or something that
    is added to them."""

    first: Tensor
    second: Tensor


class InnerState(NamedTuple):
    """The past.

    Attributes:
        now: weights behind the last token.
        start: weights before the mini-batch that the last token belongs to, where gradients are taken.
        speed: the momentum ``Z``.
        filled: real tokens of the unfinished mini-batch so far, ``(batch, heads)`` integers.
    """

    now: Weights
    start: Weights
    speed: Weights
    filled: Tensor


def initial_inner_state(weights: Weights, batch: int) -> InnerState:
    """The state before the first token of the network with these weights, ``(heads, ...)`` each."""
    now = Weights(*(w.expand(batch, *w.shape) for w in weights))
    still = Weights(*(torch.zeros_like(w) for w in now))
    filled = torch.zeros(batch, weights.first.shape[0], dtype=torch.long, device=weights.first.device)
    return InnerState(now, now, still, filled)


def inner_mlp(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    step: Float[Tensor, "batch heads tokens"],
    state: InnerState,
    *,
    log_decay: Float[Tensor, "batch heads tokens"] | None = None,
    log_momentum: Float[Tensor, "batch heads tokens"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    batch_tokens: int = 1,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], InnerState]:
    """Train on each pair in turn and answer each query with the network behind its own pair.

    ``Z_t = eta_t Z_{t-1} - beta_t grad_t``, ``W_t = exp(g_t) W_{t-1} + Z_t``, ``o_t = f(q_t; W_t)`` with the gradient
    of token t's loss taken at the weights before its mini-batch. ``batch_tokens=1`` is a step a token at the newest
    weights; longer ones need fewer passes and are a different layer. Mini-batches are counted in real tokens from the
    first of the sequence, so cutting a sequence or padding it changes nothing.

    Source: "Test-time regression" (arXiv 2501.12352); TTT (arXiv 2407.04620) without forgetting and momentum,
    Titans (arXiv 2501.00663) with them. Their norm and residual inside the network are left out.

    Args:
        step: beta, the learning rate at each token, from 0 to 2.
        state: the past, see :func:`initial_inner_state`.
        log_decay: g, at most 0: forgetting of the weights, towards 0.
        log_momentum: logarithm of eta, at most 0; ``None`` for no momentum.
        mask: real tokens.
        batch_tokens: real tokens of a mini-batch.

    Raises:
        ValueError: shapes that disagree, gates out of range, a mini-batch below 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    checked = {"step": (STEP, step), "log_decay": (LOG_DECAY, log_decay), "log_momentum": (LOG_DECAY, log_momentum)}
    given = {name: (gate, numbers) for name, (gate, numbers) in checked.items() if numbers is not None}
    check_pairs("inner_mlp", query, key, value, given, (*state.now, *state.start, *state.speed, state.filled))
    batch, heads, tokens, _ = query.shape
    log_decay = torch.zeros_like(step) if log_decay is None else log_decay
    log_momentum = torch.full_like(step, float("-inf")) if log_momentum is None else log_momentum
    real = torch.ones(batch, tokens, dtype=torch.bool, device=query.device) if mask is None else mask
    # Each real token takes the next free place of a row of mini-batches, padding the place behind the last.
    rounds = (tokens + 2 * (batch_tokens - 1)) // batch_tokens
    places = rounds * batch_tokens
    place = torch.where(real, state.filled[:, :1] + real.cumsum(dim=1) - 1, places)[:, None, :, None]

    def lay(x: Tensor) -> list[Tensor]:
        row = x.new_zeros(batch, heads, places + 1, x.shape[-1])
        row = row.scatter(2, place.expand(batch, heads, tokens, x.shape[-1]), x)
        return list(row[:, :, :places].split(batch_tokens, dim=2))

    taken = real[:, None].expand(batch, heads, tokens).to(query.dtype)
    gates = torch.stack([step, log_decay, log_momentum, taken], dim=-1)
    laid = list(zip(lay(query), lay(key), lay(value), lay(gates), strict=True))
    total = state.filled + real.sum(dim=1, keepdim=True)
    now, start, speed, _ = state
    outputs = []
    for number, (q, k, v, rates) in enumerate(laid):
        read, now, speed = _mini_batch(q, k, v, rates, now, start, speed)
        outputs.append(read)
        done = (total >= (number + 1) * batch_tokens)[..., None, None]
        start = Weights(*(torch.where(done, new, old) for new, old in zip(now, start, strict=True)))
    out = torch.cat([*outputs, torch.zeros_like(outputs[0][:, :, :1])], dim=2)
    out = out.gather(2, place.expand(batch, heads, tokens, out.shape[-1]))
    return out, InnerState(now, start, speed, total % batch_tokens)


def _mini_batch(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, now: Weights, start: Weights, speed: Weights
) -> tuple[Tensor, Weights, Weights]:
    """Answers of the places of one mini-batch, and weights and momentum behind it.

    A gradient of place i moves the momentum at s by ``-beta_i eta_{i+1} ... eta_s`` of it, and that the weights at t by
    the decays from s to t times as much. Places that are not taken keep both as they are.
    """
    inner = k @ start.first
    hidden = F.gelu(inner)
    error = hidden @ start.second - v
    slope = (error @ start.second.transpose(-1, -2)) * _gelu_slope(inner)
    beta, log_decay, log_momentum, taken = rates.unbind(-1)
    fading, whole = decays(log_decay)
    slowing, slowed = decays(log_momentum)
    fading, moved = fading * taken[:, :, None], slowing * beta[:, :, None]
    moves, whole, coast = fading @ moved, whole[..., None], fading @ slowed[..., None]
    read = whole * (q @ now.first) + coast * (q @ speed.first)
    read = F.gelu(read - (q @ k.transpose(-1, -2) * moves) @ slope)
    out = whole * (read @ now.second) + coast * (read @ speed.second)
    out = out - (read @ hidden.transpose(-1, -2) * moves) @ error
    last = [x[:, :, -1, None, None] for x in (whole[..., 0], coast[..., 0], slowed)]

    def after(weights: Tensor, momentum: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        shift, push = ((left * x[:, :, -1, :, None]).transpose(-1, -2) @ right for x in (moves, moved))
        return last[0] * weights + last[1] * momentum - shift, last[2] * momentum - push

    first, first_speed = after(now.first, speed.first, k, slope)
    second, second_speed = after(now.second, speed.second, hidden, error)
    return out, Weights(first, second), Weights(first_speed, second_speed)


def _gelu_slope(x: Tensor) -> Tensor:
    """``Phi(x) + x phi(x)``."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
