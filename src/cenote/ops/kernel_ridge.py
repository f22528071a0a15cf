"""Kernel ridge regression on all pairs so far, exact at every token."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.ops.gates import STEP, check_pairs

Kernel = Literal["linear", "dot", "gaussian"]


class KernelRidgeState(NamedTuple):
    """The past: keys and square roots of the pairs' weights ``(batch, heads, pairs, ...)``, the Cholesky factor L of
    their weighted, penalised Gram matrix ``(batch, heads, pairs, pairs)``, and ``L^-1`` times the weighted values."""

    key: Tensor
    root: Tensor
    factor: Tensor
    reduced: Tensor


def initial_kernel_ridge_state(like: Float[Tensor, "batch heads tokens key_dim"], value_dim: int) -> KernelRidgeState:
    """The state of an empty past, in the dtype and on the device of these keys."""
    batch, heads, _, width = like.shape
    keys, root, factor, reduced = (
        like.new_zeros(batch, heads, 0, *rest) for rest in ((width,), (), (0,), (value_dim,))
    )
    return KernelRidgeState(keys, root, factor, reduced)


def kernel_matrix(
    a: Float[Tensor, "*batch n dim"], b: Float[Tensor, "*batch m dim"], kernel: Kernel, scale: float
) -> Float[Tensor, "*batch n m"]:
    """``s a.b``, ``exp(s a.b)`` or ``exp(-s ||a - b||^2 / 2)`` (bandwidth ``s^-1/2``) of every pair of rows.

    Raises:
        ValueError: an unknown kernel.
    """
    inner = scale * (a @ b.transpose(-1, -2))
    if kernel == "linear":
        return inner
    if kernel == "dot":
        return inner.exp()
    if kernel == "gaussian":
        norms = a.square().sum(dim=-1)[..., :, None] + b.square().sum(dim=-1)[..., None, :]
        return (inner - scale / 2 * norms).clamp_max(0.0).exp()
    raise ValueError(f"kernel must be 'linear', 'dot' or 'gaussian', got {kernel!r}")


def kernel_ridge(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads tokens key_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    ridge: float,
    weight: Float[Tensor, "batch heads tokens"] | None = None,
    state: KernelRidgeState | None = None,
    *,
    kernel: Kernel = "gaussian",
    scale: float = 1.0,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], KernelRidgeState]:
    """Answers of the kernel ridge regression on each token's past, itself included, and the state after the last.

    ``o_t = V^T (G + lambda diag(1/beta))^-1 kappa(K, q_t)`` over the pairs up to t. One Cholesky factor serves every
    token: its leading rows are the factor of the leading pairs, so with ``y = L^-1 kappa(K, q_t)`` and ``U = L^-1 V``
    the answer is the sum of ``y_i u_i`` up to t. Costs ``pairs^3 / 3 + pairs^2 (key_dim + value_dim)`` for all tokens
    together; a further stretch of tokens extends the factor instead of starting again.

    With the linear kernel it is ridge regression (:func:`cenote.ops.ridge_recurrence.ridge_recurrence`) with ridge
    ``lambda / scale``.

    Args:
        ridge: lambda, above 0.
        weight: beta of each pair, from 0 (not there) to 2; ``None`` for 1.
        state: the past; ``None`` for none.
        kernel: see :func:`kernel_matrix`.
        scale: s of the kernel.

    Raises:
        ValueError: shapes that disagree, weights out of range, a lambda that is not above 0, an unknown kernel.
    """
    given = {} if weight is None else {"weight": (STEP, weight)}
    check_pairs("kernel ridge regression", query, key, value, given, state or ())
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    past = initial_kernel_ridge_state(key, value.shape[-1]) if state is None else state
    before, tokens = past.key.shape[2], key.shape[2]
    root = torch.ones_like(key[..., 0]) if weight is None else weight.sqrt()
    # sqrt(beta) on both sides of the Gram matrix instead of 1/beta on its diagonal: a pair of weight 0 drops out.
    gram = kernel_matrix(key, key, kernel, scale) * root[..., :, None] * root[..., None, :]
    across = kernel_matrix(past.key, key, kernel, scale) * past.root[..., :, None] * root[..., None, :]
    low = torch.linalg.solve_triangular(past.factor, across, upper=False).transpose(-1, -2)
    penalty = ridge * torch.eye(tokens, dtype=key.dtype, device=key.device)
    corner = torch.linalg.cholesky(gram + penalty - low @ low.transpose(-1, -2))
    above = torch.cat([past.factor, past.factor.new_zeros(*past.factor.shape[:3], tokens)], dim=-1)
    factor = torch.cat([above, torch.cat([low, corner], dim=-1)], dim=-2)
    fresh = root[..., None] * value - low @ past.reduced
    reduced = torch.cat([past.reduced, torch.linalg.solve_triangular(corner, fresh, upper=False)], dim=2)
    keys, roots = torch.cat([past.key, key], dim=2), torch.cat([past.root, root], dim=2)
    asked = kernel_matrix(keys, query, kernel, scale) * roots[..., None]
    solved = torch.linalg.solve_triangular(factor, asked, upper=False)
    solved = solved.transpose(-1, -2).tril(before)
    return solved @ reduced, KernelRidgeState(keys, roots, factor, reduced)
