"""Regression of values on keys, fitted anew around every query: local constant, local linear and beyond.

At a query q the pairs are weighted by a kernel, ``w_i`` proportional to ``K(q, k_i)`` with sum 1, and a polynomial in
``z_i = k_i - q`` is fitted to the values. The answer is its value at ``z = 0``. Degree 0 is softmax attention (the
Nadaraya-Watson estimator); degree 1 follows the slope of the values, which a constant smears out wherever the keys lie
lopsidedly around the query: at the edge of the data, or where its density changes.

With ``mean`` and ``Cov`` under the weights and features ``phi(z)`` without a constant, the ridge fit
``min sum_i w_i ||v_i - b - M phi(z_i)||^2 + lambda ||M||^2`` has the intercept::

    b = mean(v) - Cov(v, phi) (Cov(phi) + lambda I)^-1 mean(phi)

which is the form used here: it needs no quotient, and its matrix is that of centred features. Source: "Test-time
regression" (arXiv 2501.12352).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cenote.ops.conjugate_gradients import conjugate_gradients, require_definite
from cenote.ops.masked import widen

Kernel = Literal["dot", "gaussian"]
LocalSolver = Literal["direct", "cg"]
Seen = Bool[Tensor, "batch heads pairs"]


def local_constant(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    value: Float[Tensor, "batch heads pairs value_dim"],
    seen: Seen | None = None,
    *,
    causal: bool = True,
    kernel: Kernel = "dot",
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """``o = sum_i w_i v_i``, the weighted mean of the values.

    Kernels: ``"dot"`` is ``exp(s q.k)``, which makes it softmax attention; ``"gaussian"`` ``exp(-s ||q - k||^2 / 2)``
    (bandwidth ``h = s^-1/2``). The two agree where all keys have the same norm; otherwise the first gives a key an
    extra weight ``exp(s ||k||^2 / 2)`` and is no longer a decreasing function of distance.

    Args:
        query: the last ``tokens`` of the sequence if ``causal``.
        key: of every pair, those of the past in front.
        seen: ``False`` for a pair that is not there; ``None`` for all there.
        causal: a query sees the pairs up to its own.
        scale: s; ``key_dim ** -0.5`` by default.
        window: a causal query sees this many pairs, its own included; ``None`` for all.

    Raises:
        ValueError: shapes that disagree, an unknown kernel, a window below 1 or without ``causal``.
    """
    _check(query, key, value, kernel, causal, window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if kernel == "gaussian":  # the same dot kernel of vectors with one more feature: q.k - ||k||^2 / 2
        query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
        key = torch.cat([key, key.square().sum(dim=-1, keepdim=True) / -2], dim=-1)
    if window is None and seen is None and (not causal or query.shape[2] == key.shape[2]):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    allowed = _allowed(query.shape[2], key.shape[2], slice(0, query.shape[2]), seen, causal, window, query.device)
    allowed = allowed | ~allowed.any(dim=-1, keepdim=True)  # a query that sees nothing is padding: anything but NaN
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, scale=scale)


def local_polynomial(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    value: Float[Tensor, "batch heads pairs value_dim"],
    seen: Seen | None = None,
    *,
    degree: int = 1,
    ridge: float = 0.1,
    causal: bool = True,
    kernel: Kernel = "dot",
    scale: float | None = None,
    window: int | None = None,
    solver: LocalSolver = "direct",
    iterations: int = 8,
    block: int | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The value at each query of a polynomial fitted around it; see the head of this file for the formula.

    An affine map of the keys is reproduced exactly by degree 1 and ``ridge=0``, whatever the kernel; ``ridge`` to
    infinity gives :func:`local_constant`; ``scale=0`` and ``ridge=0`` plain linear regression with an intercept.
    The weights of the values sum to 1 and may be negative.

    Args:
        degree: of the polynomial; all its monomials are features.
        ridge: lambda, on everything but the constant. 0 only where every query sees enough pairs.
        solver: ``"direct"`` forms the covariance of the features at every query, ``tokens * pairs * features^2``
            operations; ``"cg"`` (degree 1) spends ``iterations`` products with it, each costing as much as an attention
            with given weights: two products ``tokens x pairs x key_dim``.
        iterations: of ``"cg"``; ``key_dim`` makes it exact but for rounding.
        block: queries worked on at a time; nothing of size ``tokens * pairs`` is ever held, also not for the backward
            pass, which computes each block again. By default 16 (direct) or 128.

    The other arguments and errors are those of :func:`local_constant`.

    Raises:
        ValueError: a degree below 1, a negative ridge, a ridge of 0 with a covariance that is singular, an unknown
            solver, conjugate gradients of another degree than 1.
    """
    _check(query, key, value, kernel, causal, window)
    if degree < 1 or (solver == "cg" and degree > 1):
        raise ValueError(f"degree must be at least 1, and 1 for solver 'cg'; got degree={degree}, solver={solver!r}")
    if solver not in ("direct", "cg"):
        raise ValueError(f"solver must be 'direct' or 'cg', got {solver!r}")
    if not ridge >= 0:
        raise ValueError(f"ridge must be 0 or above, got {ridge}")
    if ridge == 0 and (causal or key.shape[2] <= query.shape[3]):
        raise ValueError(
            "ridge 0 leaves a query that sees no more pairs than there are features without a unique fit, and the "
            f"first causal query sees one pair: give a ridge above 0 (causal={causal}, pairs={key.shape[2]})"
        )

    def fit(q: Tensor, weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if solver == "direct":
            return _fit_directly(q, weights, k, v, degree, ridge)
        slope = _slope_by_gradients(q, weights, k, ridge, iterations)
        return _tilt(weights, k, v, slope)

    settings = (seen, causal, kernel, scale, window, block or (16 if solver == "direct" else 128))
    return _by_blocks(fit, (query,), key, value, *settings)


def parallax(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    value: Float[Tensor, "batch heads pairs value_dim"],
    direction: Float[Tensor, "batch heads tokens key_dim"],
    seen: Seen | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    block: int = 128,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """``o = mean(v) - Cov(v, k) r`` with a learned ``r`` in place of local linear's solution (arXiv 2605.29157).

    ``r = (Cov(k) + lambda I)^-1 (mean(k) - q)``, see :func:`local_slope`, makes it local linear attention.

    Args:
        direction: r, one a query; not scaled.

    The other arguments and errors are those of :func:`local_constant`.
    """
    _check(query, key, value, "dot", causal, window)
    if direction.shape != query.shape:
        raise ValueError(f"r must have the shape of the queries {tuple(query.shape)}, got {tuple(direction.shape)}")

    def fit(q: Tensor, r: Tensor, weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _tilt(weights, k, v, r)

    return _by_blocks(fit, (query, direction), key, value, seen, causal, "dot", scale, window, block)


def local_slope(
    query: Float[Tensor, "batch heads tokens key_dim"],
    key: Float[Tensor, "batch heads pairs key_dim"],
    seen: Seen | None = None,
    *,
    ridge: float = 0.1,
    causal: bool = True,
    scale: float | None = None,
    block: int = 16,
) -> Float[Tensor, "batch heads tokens key_dim"]:
    """``(Cov(k) + lambda I)^-1 (mean(k) - q)``: the direction with which Parallax is local linear attention."""
    _check(query, key, key, "dot", causal, None)
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")

    def fit(q: Tensor, weights: Tensor, k: Tensor, v: Tensor) -> Tensor:
        matrix, mean = _moments(k[:, :, None] - q[:, :, :, None], weights, ridge)
        return torch.linalg.solve(matrix, mean[..., None])[..., 0]

    return _by_blocks(fit, (query,), key, key, seen, causal, "dot", scale, None, block)


def monomials(z: Float[Tensor, "*batch dim"], degree: int) -> Float[Tensor, "*batch features"]:
    """All monomials of degree 1 to ``degree``, each once: ``z_i``, ``z_i z_j`` with ``i <= j``, and so on."""
    width = z.shape[-1]
    features, last, top = [z], z, list(range(width))
    for _ in range(degree - 1):
        # Each monomial times the variables from its own highest on.
        pairs = [(m, d) for m, high in enumerate(top) for d in range(high, width)]
        last = torch.stack([last[..., m] * z[..., d] for m, d in pairs], dim=-1)
        top = [d for _, d in pairs]
        features.append(last)
    return torch.cat(features, dim=-1)


def _fit_directly(q: Tensor, weights: Tensor, k: Tensor, v: Tensor, degree: int, ridge: float) -> Tensor:
    """Intercepts of the fits around a block of queries."""
    features = monomials(k[:, :, None] - q[:, :, :, None], degree)
    matrix, mean = _moments(features, weights, ridge)
    if ridge == 0:
        require_definite(matrix, "local regression", "ridge 0 needs pairs that span the features; give one above 0")
    solved = torch.linalg.solve(matrix, mean[..., None])
    tilted = weights * (1 - ((features - mean[..., None, :]) @ solved)[..., 0])
    return tilted @ v


def _moments(features: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``Cov + lambda I`` and the mean of features ``(batch, heads, queries, pairs, features)``."""
    mean = (weights[..., None, :] @ features)[..., 0, :]
    centred = features - mean[..., None, :]
    covariance = (weights[..., None] * centred).transpose(-1, -2) @ centred
    return covariance + ridge * torch.eye(features.shape[-1], dtype=mean.dtype, device=mean.device), mean


def _slope_by_gradients(q: Tensor, weights: Tensor, k: Tensor, ridge: float, iterations: int) -> Tensor:
    mean, extended = weights @ k, _with_one(k)

    def product(x: Tensor) -> Tensor:
        tilted = _along(x, -(x * mean).sum(dim=-1, keepdim=True), extended).mul_(weights) @ extended
        return tilted[..., :-1] - tilted[..., -1:] * mean + ridge * x

    return conjugate_gradients(product, mean - q, None, iterations)


def _tilt(weights: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """``mean(v) - Cov(v, k) r``: the values' mean under weights ``w_i (1 - r.(k_i - mean(k)))``."""
    mean = weights @ k
    shift = 1 + (slope * mean).sum(dim=-1, keepdim=True)
    return _along(-slope, shift, _with_one(k)).mul_(weights) @ v


def _along(x: Tensor, shift: Tensor, extended: Tensor) -> Tensor:
    """``x.k_i + shift`` of every pair in one product, without another pass over what is the largest tensor."""
    return torch.cat([x, shift], dim=-1) @ extended.transpose(-1, -2)


def _with_one(k: Tensor) -> Tensor:
    return torch.nn.functional.pad(k, (0, 1), value=1.0)


def _by_blocks(
    fit: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    causal: bool,
    kernel: Kernel,
    scale: float | None,
    window: int | None,
    block: int,
) -> Tensor:
    """``fit(*rows, weights, keys, values)`` on a few queries at a time, with the keys that any of them sees."""
    dtype = value.dtype
    rows, key, value = tuple(widen(x) for x in rows), widen(key), widen(value)
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    tokens, pairs = rows[0].shape[2], key.shape[2]

    def one(part: slice, *tensors: Tensor) -> Tensor:
        (*inner, k, v), ahead = tensors, None if seen is None else seen[:, :, : tensors[-1].shape[2]]
        scores = scale * inner[0] @ k.transpose(-1, -2)
        if kernel == "gaussian":
            scores = scores - scale / 2 * k.square().sum(dim=-1)[:, :, None]
        if causal and window is None and ahead is None:
            # Only the last columns hold later pairs, and every row has its own to see.
            size = part.stop - part.start
            later = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
            scores[..., k.shape[2] - size :].masked_fill_(later, float("-inf"))
            return fit(*inner, scores.softmax(dim=-1), k, v)
        allowed = _allowed(tokens, pairs, part, ahead, causal, window, k.device)[..., : k.shape[2]]
        # Finite instead of -inf, and 0 afterwards: a query that sees nothing has weights 0, not NaN.
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1) * allowed
        return fit(*inner, weights, k, v)

    outputs = []
    again = torch.is_grad_enabled() and tokens > block and any(x.requires_grad for x in (*rows, key, value))
    for start in range(0, tokens, block):
        part = slice(start, min(start + block, tokens))
        end = pairs - tokens + part.stop if causal else pairs
        tensors = (*(x[:, :, part] for x in rows), key[:, :, :end], value[:, :, :end])
        outputs.append(checkpoint(one, part, *tensors, use_reentrant=False) if again else one(part, *tensors))
    return torch.cat(outputs, dim=2).to(dtype)


def _allowed(
    tokens: int, pairs: int, part: slice, seen: Tensor | None, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which pairs the queries of this part see, ``(queries, pairs)`` or ``(batch, heads, queries, pairs)``."""
    rows = torch.arange(part.start, part.stop, device=device)[:, None] + pairs - tokens
    columns = torch.arange(pairs if seen is None else seen.shape[2], device=device)
    allowed = (columns <= rows) if causal else torch.ones_like(columns <= rows)
    if window is not None:
        allowed = allowed & (columns > rows - window)
    return allowed if seen is None else allowed & seen[:, :, None]


def _check(query: Tensor, key: Tensor, value: Tensor, kernel: str, causal: bool, window: int | None) -> None:
    shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"local regression takes queries, keys and values (batch, heads, n, width), got {shapes}")
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(f"queries and keys must agree in batch, heads and width, got {shapes}")
    if query.shape[2] == 0 or key.shape[2] < (query.shape[2] if causal else 1):
        raise ValueError(f"there must be a query, and for each its own pair if causal, got {shapes}")
    if kernel not in ("dot", "gaussian"):
        raise ValueError(f"kernel must be 'dot' or 'gaussian', got {kernel!r}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window is at least 1 and looks back, got window={window}, causal={causal}")
