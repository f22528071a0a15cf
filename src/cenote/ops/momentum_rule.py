"""Gradient steps with memory: momentum (linear Titans), and one gradient for a mini-batch of tokens (linear TTT).

Momentum: ``Z = eta Z + theta k (v - S^T k)^T;  S = a S + Z;  o = scale S^T q`` with the error measured at the state as
the token finds it and ``a = 1 - alpha`` (Titans' forgetting). Mini-batch: ``S += sum_i beta_i k_i (v_i - S_0^T k_i)^T``
with ``S_0`` the state at the start of the mini-batch. States are ``(batch, heads, key_dim, value_dim)``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.ops.chunks import CHUNK, causal, chunk_length, cut, decays, join
from cenote.ops.triangular import BLOCK, solve_unit_lower

MomentumState = tuple[Tensor, Tensor]
MiniBatchState = tuple[Tensor, Tensor, Tensor]


def chunk_momentum(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    theta: Float[Tensor, "batch heads tokens"],
    log_eta: Float[Tensor, "batch heads tokens"],
    g: Float[Tensor, "batch heads tokens"],
    state: MomentumState,
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    chunk_size: int | None = CHUNK,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], MomentumState]:
    """Outputs of a stretch of tokens and the state ``(S, Z)`` after it.

    What the correction of token j still weighs in ``S_t`` is ``W_tj = sum_{j <= i <= t} a_{i+1} ... a_t  eta_{j+1} ...
    eta_i``, the product of the two matrices of decays; with it in the place of ``D`` the corrections solve the same
    kind of triangular system as those of the delta rule. No official code has this chunked form.

    Args:
        theta: step size.
        log_eta: logarithm of the momentum's decay.
        g: logarithm of the state's decay.
        state: ``S`` and ``Z``.
        real: ``False`` where the momentum is not added, so that a step with zero gates changes nothing.
    """
    batch, heads, tokens, _ = query.shape
    size = chunk_length(tokens, chunk_size, BLOCK)
    query, key, value = (cut(x, size) for x in (query * scale, key, value))
    steps = cut(theta, size).unsqueeze(-1)
    added = torch.ones_like(theta) if real is None else real[:, None].to(theta.dtype).expand_as(theta)
    (fading, kept), (slowing, slowed) = decays(cut(g, size)), decays(cut(log_eta, size))
    reach = fading * cut(added, size).unsqueeze(-2)
    weights = reach @ slowing
    kept, pushed = kept.unsqueeze(-1), reach @ slowed.unsqueeze(-1)
    # A token's error is measured before its own step: the row above.
    earlier = torch.cat([torch.zeros_like(weights[:, :, :1]), weights[:, :, :-1]], dim=2)
    kept_before = torch.cat([torch.ones_like(kept[:, :, :1]), kept[:, :, :-1]], dim=2)
    pushed_before = torch.cat([torch.zeros_like(pushed[:, :, :1]), pushed[:, :, :-1]], dim=2)
    turned, weighted = key.transpose(-1, -2), steps * key
    right = torch.cat([steps * value, kept_before * weighted, pushed_before * weighted], dim=-1)
    system = (weighted @ turned * earlier).flatten(0, 1)
    solved = solve_unit_lower(system, right.flatten(0, 1)).view_as(right)
    fresh, seen = solved.split([value.shape[-1], 2 * key.shape[-1]], dim=-1)
    last_momentum = slowing[:, :, -1].unsqueeze(-1)
    writes = torch.cat([turned * weights[:, :, -1:], turned * last_momentum.transpose(-1, -2)], dim=2)
    kept_last, pushed_last = kept[:, :, -1:].unbind(1), pushed[:, :, -1:].unbind(1)
    slowed_last = slowed[:, :, -1, None, None].unbind(1)
    now, moving = (part.flatten(0, 1) for part in state)
    before, corrected = [], []
    for chunk, (fixed, reading, write) in enumerate(
        zip(fresh.unbind(1), seen.unbind(1), writes.unbind(1), strict=True)
    ):
        before.append(torch.cat([now, moving], dim=1))
        corrected.append(torch.baddbmm(fixed, reading, before[-1], alpha=-1))
        onto_state, onto_momentum = (write @ corrected[-1]).chunk(2, dim=1)
        now = kept_last[chunk] * now + pushed_last[chunk] * moving + onto_state
        moving = slowed_last[chunk] * moving + onto_momentum
    reads = torch.cat([query * kept, query * pushed], dim=-1)
    out = reads @ torch.stack(before, dim=1) + (query @ turned * weights) @ torch.stack(corrected, dim=1)
    return join(out, batch, tokens), tuple(part.unflatten(0, (batch, heads)) for part in (now, moving))


def step_momentum(
    query: Float[Tensor, "batch heads 1 key_dim"],
    key: Float[Tensor, "batch heads 1 key_dim"],
    value: Float[Tensor, "batch heads 1 value_dim"],
    theta: Float[Tensor, "batch heads 1"],
    log_eta: Float[Tensor, "batch heads 1"],
    g: Float[Tensor, "batch heads 1"],
    state: MomentumState,
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], MomentumState]:
    """One token by the definition."""
    now, moving = state
    step = (theta.unsqueeze(-1) * key).transpose(-1, -2) @ (value - key @ now)
    moving = log_eta.exp().unsqueeze(-1) * moving + step
    now = g.exp().unsqueeze(-1) * now + moving
    return scale * query @ now, (now, moving)


def chunk_mini_batch(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    beta: Float[Tensor, "batch heads tokens"],
    state: MiniBatchState,
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    batch_tokens: int = 16,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], MiniBatchState]:
    """Outputs of a stretch of tokens and the state after it.

    A token is answered by the state with its own step in it. The mini-batches are counted from the start of the
    sequence, wherever a stretch begins, so their length (and nothing else) changes the result.

    Args:
        state: the state now, the one at the start of the mini-batch, and how many tokens of the mini-batch have been,
            ``(batch, heads)``.
        real: the tokens to count, those of each row in front.
        batch_tokens: tokens of a mini-batch.
    """
    batch, heads, tokens, _ = query.shape
    now, start, place = state
    # Every row stands behind the tokens its unfinished mini-batch has already had.
    lead = place[:, 0].long()
    slots = batch_tokens - 1 + tokens
    slots += -slots % batch_tokens
    source = torch.arange(slots, device=query.device) - lead[:, None]
    inside = (source >= 0) & (source < tokens)
    source = source.clamp(0, tokens - 1)
    query, key, value, steps = (
        cut(_pick(x, source) * inside[:, None, :, None], batch_tokens)
        for x in (query * scale, key, value, beta.unsqueeze(-1))
    )
    turned, weighted = key.transpose(-1, -2), steps * value
    seen = steps * key
    now, anchor = now.flatten(0, 1), start.flatten(0, 1)
    starts, before, corrected = [], [], []
    for fixed, reading, write in zip(weighted.unbind(1), seen.unbind(1), turned.unbind(1), strict=True):
        starts.append(anchor)
        before.append(now)
        corrected.append(torch.baddbmm(fixed, reading, anchor, alpha=-1))
        now = anchor = torch.baddbmm(now, write, corrected[-1])
    starts.append(now)
    scores = query @ turned * causal(steps[..., 0])
    out = query @ torch.stack(before, dim=1) + scores @ torch.stack(corrected, dim=1)
    out = _pick(join(out, batch, slots), lead[:, None] + torch.arange(tokens, device=query.device))
    count = lead + (tokens if real is None else real.sum(dim=1))
    begun = torch.stack(starts, dim=1).unflatten(0, (batch, heads))
    start = begun[torch.arange(batch, device=query.device), :, count // batch_tokens]
    return out, (
        now.unflatten(0, (batch, heads)),
        start,
        (count % batch_tokens)[:, None].to(place.dtype).expand_as(place),
    )


def _pick(
    x: Float[Tensor, "batch heads tokens width"], index: Int[Tensor, "batch slots"]
) -> Float[Tensor, "batch heads slots width"]:
    """Tokens by their numbers, each row its own."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
