"""Ridge regression on all pairs so far, solved exactly at every token (recursive least squares, Mesa layer)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.ops.chunks import decays
from cenote.ops.conjugate_gradients import conjugate_gradients, require_definite
from cenote.ops.gates import LOG_DECAY, STEP, check_pairs

Solver = Literal["direct", "cg"]
BLOCK = 32
"""Tokens that are solved together. With the direct solver each holds a Gram matrix of its own meanwhile."""


class RidgeState(NamedTuple):
    """``sum_i gamma_i k_i k_i^T`` ``(batch, heads, key_dim, key_dim)`` and ``sum_i gamma_i k_i v_i^T``
    ``(batch, heads, key_dim, value_dim)``."""

    gram: Tensor
    cross: Tensor


def initial_ridge_state(like: Float[Tensor, "batch heads tokens key_dim"], value_dim: int) -> RidgeState:
    """The state of an empty past, in the dtype and on the device of these keys."""
    batch, heads, _, width = like.shape
    return RidgeState(like.new_zeros(batch, heads, width, width), like.new_zeros(batch, heads, width, value_dim))


def ridge_recurrence(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    ridge: Float[Tensor, "heads key_dim"] | float,
    log_decay: Float[Tensor, "batch heads tokens"] | None = None,
    weight: Float[Tensor, "batch heads tokens"] | None = None,
    state: RidgeState | None = None,
    *,
    solver: Solver = "direct",
    iterations: int | None = None,
    block: int = BLOCK,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], RidgeState]:
    """Answers of the weighted ridge regression on each token's past, itself included, and the state after the last.

    ``A_t = a_t A_{t-1} + beta_t k_t k_t^T``, ``C_t = a_t C_{t-1} + beta_t k_t v_t^T``,
    ``o_t = C_t^T (A_t + diag(lambda))^-1 q_t``: the minimiser of
    ``sum_i gamma_i^(t) ||v_i - S^T k_i||^2 + sum_d lambda_d ||S_d||^2``. The penalty does not decay, so this is not the
    recursion by Sherman-Morrison, whose penalty does. A token with weight 0 and log-decay 0 changes nothing.

    Source: "Test-time regression" (arXiv 2501.12352); Mesa layers (arXiv 2309.05858, 2506.05233).

    Args:
        query: not scaled, since the solution is not homogeneous in the keys.
        ridge: lambda, one a head and key feature, or one number.
        log_decay: logarithm of ``a_t``, at most 0; ``None`` for no decay.
        weight: beta_t, from 0 to 2; ``None`` for 1.
        state: the past; ``None`` for none.
        solver: ``"direct"`` costs about ``key_dim^3`` a token and holds ``block`` Gram matrices; ``"cg"`` costs
            ``2 key_dim^2`` an iteration and holds none.
        iterations: of ``"cg"``; ``key_dim`` by default, which is exact but for rounding.
        block: tokens solved together; the outputs do not depend on it.

    Raises:
        ValueError: shapes that disagree, gates out of range, a negative lambda, a lambda of 0 where the pairs so far do
            not span the key space, an unknown solver.
    """
    if solver not in ("direct", "cg"):
        raise ValueError(f"solver must be 'direct' or 'cg', got {solver!r}")
    if block < 1:
        raise ValueError(f"a block has at least one token, got {block}")
    batch, heads, tokens, width = query.shape
    gates = {"log_decay": (LOG_DECAY, log_decay), "weight": (STEP, weight)}
    given = {name: (gate, numbers) for name, (gate, numbers) in gates.items() if numbers is not None}
    check_pairs("ridge regression", query, key, value, given, state or ())
    penalty = torch.as_tensor(ridge, dtype=query.dtype, device=query.device).expand(heads, width)
    singular = _check_penalty(penalty)
    log_decay = query.new_zeros(batch, heads, tokens) if log_decay is None else log_decay
    weight = torch.ones_like(log_decay) if weight is None else weight
    gram, cross = initial_ridge_state(key, value.shape[-1]) if state is None else state
    outputs = []
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
        between, fading = decays(log_decay[:, :, part])
        among, before = between * weight[:, :, None, part], fading[..., None]
        if solver == "direct" or singular:
            pairs = (k[..., :, None] * k[..., None, :]).flatten(-2)
            grams = (before * gram.flatten(-2)[:, :, None] + among @ pairs).unflatten(-1, (width, width))
            grams = grams + penalty[:, None].diag_embed()
            if singular:
                reason = "ridge 0 needs pairs that span the key space before the first query; give a ridge above 0"
                require_definite(grams, "ridge regression", reason)
            # Not by Cholesky factors, though half the work: their gradient costs several times this one's.
            solved = torch.linalg.solve(grams, q[..., None])[..., 0]
        else:
            solved = _by_gradients(q, k, gram, among, before, penalty, iterations or width)
        read = solved @ k.transpose(-1, -2) * among
        outputs.append(before * (solved @ cross) + read @ v)
        decayed_keys = (k * among[:, :, -1, :, None]).transpose(-1, -2)
        last = before[:, :, -1:]
        gram, cross = last * gram + decayed_keys @ k, last * cross + decayed_keys @ v
    return torch.cat(outputs, dim=2), RidgeState(gram, cross)


def _by_gradients(
    q: Tensor, k: Tensor, gram: Tensor, among: Tensor, before: Tensor, penalty: Tensor, iterations: int
) -> Tensor:
    """``(A_t + lambda)^-1 q_t`` for every token of a block without forming ``A_t``."""
    penalty = penalty[:, None]

    def product(x: Tensor) -> Tensor:
        return before * (x @ gram) + (x @ k.transpose(-1, -2) * among) @ k + penalty * x

    diagonal = before * gram.diagonal(dim1=-2, dim2=-1)[:, :, None] + among @ k.square() + penalty
    return conjugate_gradients(product, q, q / diagonal, iterations)


def _check_penalty(penalty: Tensor) -> bool:
    """Whether a lambda is 0; negative ones are refused. While compiling all are taken to be above 0."""
    if torch.compiler.is_compiling():
        return False
    least = float(penalty.detach().min())
    if not least >= 0:
        raise ValueError(f"ridge must be above 0, got {least:g}")
    return least == 0
