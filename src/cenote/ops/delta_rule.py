"""The delta rule: each token corrects what the state predicts for its key, by one gradient step on the error.

``S' = exp(g) S;  S = S' + beta k (v - S'^T k)^T;  o = scale S^T q``. The state ``S`` is
``(batch, heads, key_dim, value_dim)``, gates are ``(batch, heads, tokens)``. Without ``g`` this is DeltaNet, with it
Gated DeltaNet (the error is measured after the decay); with several keys and values a token it is DeltaProduct (one
decay, then one step a pair). ``beta |k|^2`` up to 2 is stable, up to 1 without oscillation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.ops.chunks import CHUNK, causal, chunk_length, cut, decays, join
from cenote.ops.triangular import BLOCK, solve_unit_lower


def implicit_step(
    key: Float[Tensor, "*batch tokens key_dim"], alpha: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """``alpha / (1 + alpha |k|^2)``, the delta step that minimises ``|S - S_before|^2 + alpha |S^T k - v|^2``."""
    return alpha / (1 + alpha * key.square().sum(dim=-1))


def normalised_step(key: Float[Tensor, "*batch tokens key_dim"], eps: float) -> Float[Tensor, "*batch tokens"]:
    """``1 / (eps + |k|^2)``, the step of the normalised least-mean-squares filter; ``eps`` is above 0."""
    return 1 / (eps + key.square().sum(dim=-1))


def chunk_delta_rule(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    value: Float[Tensor, "batch heads pairs value_dim"],
    beta: Float[Tensor, "batch heads pairs"],
    g: Float[Tensor, "batch heads tokens"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    chunk_size: int | None = CHUNK,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """Outputs of a stretch of tokens and the state after it, chunk by chunk.

    Inside a chunk the corrected values ``u_i = beta_i (v_i - S'_i^T k_i)`` solve a triangular system,
    ``(I + strict_lower(diag(beta) (K K^T) * D)) U = diag(beta) (V - diag(e^c) K S)`` with ``D_ij = e^(c_i - c_j)``.
    The systems of all chunks are solved together, for the part with ``V`` and the part that multiplies the state;
    what is left for the loop over chunks is ``U - W S`` and the state's update.

    Args:
        key: with ``n`` times as many rows as ``query``, each token makes ``n`` steps and is read after the last.
        chunk_size: pairs in a chunk; ``None`` for one chunk.
        scale: factor of the queries.

    Raises:
        ValueError: a chunk size below 1, or rows of keys that are no multiple of the tokens.
    """
    (batch, heads, tokens, _), pairs = query.shape, key.shape[2] // query.shape[2]
    if key.shape[2] != pairs * tokens:
        raise ValueError(f"{key.shape[2]} keys are no multiple of {tokens} tokens")
    size = chunk_length(tokens * pairs, chunk_size, BLOCK)
    size += -size % pairs
    reads = cut(query, size // pairs)
    keys, values, steps = cut(key, size), cut(value, size), cut(beta, size).unsqueeze(-1)
    weighted = steps * keys
    turned = keys.transpose(-1, -2)
    overlaps, scores = weighted @ turned, reads @ turned
    if g is None:
        scores = scores * causal(steps[..., 0])[pairs - 1 :: pairs]
        writes, kept, known = keys, None, weighted
    else:
        between, fading = decays(cut(spread(g, pairs), size))
        fading = fading.unsqueeze(-1)
        overlaps, scores = overlaps * between, scores * between[:, :, pairs - 1 :: pairs]
        writes, known = keys * between[:, :, -1].unsqueeze(-1), weighted * fading
        kept = fading[:, :, -1:].unbind(1)
        reads = reads * fading[:, :, pairs - 1 :: pairs]
    right = torch.cat([steps * values, known], dim=-1)
    solved = solve_unit_lower(overlaps.flatten(0, 1), right.flatten(0, 1)).view_as(right)
    fresh, seen = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    turned = writes.transpose(-1, -2)
    now = value.new_zeros(batch * heads, key.shape[-1], value.shape[-1]) if state is None else state.flatten(0, 1)
    before, corrected = [], []
    # Unbound, not indexed: the gradient of an index would fill a tensor of all chunks for each of them.
    for fixed, moving, write, decay in zip(
        fresh.unbind(1), seen.unbind(1), turned.unbind(1), kept or [None] * keys.shape[1], strict=True
    ):
        before.append(now)
        corrected.append(torch.baddbmm(fixed, moving, now, alpha=-1))
        now = torch.baddbmm(now if decay is None else now * decay, write, corrected[-1])
    read = reads.flatten(0, 1) @ torch.stack(before, dim=1).flatten(0, 1)
    own = torch.stack(corrected, dim=1).flatten(0, 1)
    out = torch.baddbmm(read, scores.flatten(0, 1), own, beta=scale, alpha=scale).unflatten(0, keys.shape[:2])
    return join(out, batch, tokens), now.unflatten(0, (batch, heads))


def step_delta_rule(
    query: Float[Tensor, "batch heads 1 key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    value: Float[Tensor, "batch heads pairs value_dim"],
    beta: Float[Tensor, "batch heads pairs"],
    g: Float[Tensor, "batch heads 1"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"],
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """One token by the definition: decay, then a step for each of its pairs, then read."""
    if g is not None:
        state = g.exp().unsqueeze(-1) * state
    for pair in range(key.shape[2]):
        row = key[:, :, pair : pair + 1]
        error = value[:, :, pair : pair + 1] - row @ state
        state = state + (beta[:, :, pair, None, None] * row).transpose(-1, -2) @ error
    return scale * query @ state, state


def spread(g: Float[Tensor, "batch heads tokens"], pairs: int) -> Float[Tensor, "batch heads pairs"]:
    """The decay of a token on the first of its pairs, 0 on the others."""
    if pairs == 1:
        return g
    return torch.cat([g.unsqueeze(-1), g.new_zeros(*g.shape, pairs - 1)], dim=-1).flatten(2)
