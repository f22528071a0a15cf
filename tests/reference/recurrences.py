"""The recurrences of test-time regression by their definitions: one token at a time, one row a sequence and head."""

import torch


def linear(q, k, v, g=None, state=None, scale=1.0):
    """``S = a S + k v^T``; ``g`` (batch, heads, tokens) or (batch, heads, tokens, key_dim)."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    out = []
    for t in range(q.shape[2]):
        if g is not None:
            decay = g[:, :, t].exp()
            state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        out.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(out, 2), state


def delta(q, k, v, beta, g=None, state=None, scale=1.0):
    """Decay, then a delta step for each of a token's pairs, then read."""
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    pairs = k.shape[2] // q.shape[2]
    out = []
    for t in range(q.shape[2]):
        if g is not None:
            state = state * g[:, :, t, None, None].exp()
        for i in range(t * pairs, (t + 1) * pairs):
            error = v[:, :, i] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, i])
            state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, :, i], k[:, :, i], error)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(out, 2), state


def momentum(q, k, v, theta, eta, alpha, state=None, scale=1.0):
    """``Z = eta Z + theta k (v - S^T k)^T; S = (1 - alpha) S + Z``."""
    zeros = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    now, moving = (zeros, zeros) if state is None else state
    out = []
    for t in range(q.shape[2]):
        error = v[:, :, t] - torch.einsum("bhkv,bhk->bhv", now, k[:, :, t])
        step = torch.einsum("bh,bhk,bhv->bhkv", theta[:, :, t], k[:, :, t], error)
        moving = eta[:, :, t, None, None] * moving + step
        now = (1 - alpha[:, :, t, None, None]) * now + moving
        out.append(scale * torch.einsum("bhkv,bhk->bhv", now, q[:, :, t]))
    return torch.stack(out, 2), (now, moving)


def mini_batch(q, k, v, beta, size, scale=1.0):
    """Each gradient is taken at the state with which its mini-batch of ``size`` tokens began."""
    now = start = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for t in range(q.shape[2]):
        start = now if t % size == 0 else start
        error = v[:, :, t] - torch.einsum("bhkv,bhk->bhv", start, k[:, :, t])
        now = now + torch.einsum("bh,bhk,bhv->bhkv", beta[:, :, t], k[:, :, t], error)
        out.append(scale * torch.einsum("bhkv,bhk->bhv", now, q[:, :, t]))
    return torch.stack(out, 2), now
