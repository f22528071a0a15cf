"""Local regression against weighted least squares query by query, its limits, and what it may hold in memory."""

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from cenote.ops.local_regression import local_constant, local_polynomial, local_slope, monomials, parallax

BATCH, HEADS, TOKENS, KEY, VALUE = 2, 2, 21, 4, 3


@pytest.fixture
def given():
    widths = (KEY, KEY, VALUE)
    return tuple(torch.randn(BATCH, HEADS, TOKENS, width, dtype=torch.float64) for width in widths)


def query_by_query(q, k, v, ridge, scale, causal=True, seen=None, kernel="dot", degree=1):
    """Weighted least squares with an unpenalised intercept, from the normal equations."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                there = [i for i in range(t + 1 if causal else k.shape[2]) if seen is None or seen[b, h, i]]
                keys, values, z = k[b, h, there], v[b, h, there], k[b, h, there] - q[b, h, t]
                logits = scale * keys @ q[b, h, t] if kernel == "dot" else -scale / 2 * z.square().sum(dim=1)
                weights = logits.softmax(dim=0)
                design = torch.cat([torch.ones_like(z[:, :1]), monomials(z, degree)], dim=1)
                penalty = ridge * torch.eye(design.shape[1], dtype=q.dtype)
                penalty[0, 0] = 0
                normal = design.T @ (weights[:, None] * design) + penalty
                out[b, h, t] = torch.linalg.solve(normal, design.T @ (weights[:, None] * values))[0]
    return out


@pytest.mark.parametrize("kernel", ["dot", "gaussian"])
@pytest.mark.parametrize(("solver", "block"), [("direct", None), ("direct", 4), ("cg", None), ("cg", 5)])
def test_is_weighted_least_squares(given, kernel, solver, block):
    expected = query_by_query(*given, 0.1, 0.6, kernel=kernel)
    settings = {"ridge": 0.1, "scale": 0.6, "kernel": kernel, "solver": solver, "block": block}
    torch.testing.assert_close(local_polynomial(*given, **settings), expected)


def test_degree_two(given):
    expected = query_by_query(*given, 0.1, 0.6, degree=2)
    torch.testing.assert_close(local_polynomial(*given, ridge=0.1, scale=0.6, degree=2), expected)


def test_monomials_are_counted_once():
    z = torch.tensor([2.0, 3.0, 5.0])
    assert monomials(z, 2).tolist() == [2, 3, 5, 4, 6, 10, 9, 15, 25]
    assert monomials(torch.ones(3), 3).shape == (19,)  # 3 + 6 + 10


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_pairs_that_are_not_there(given, solver):
    q, k, v = given
    seen = torch.rand(BATCH, HEADS, TOKENS) > 0.3
    seen[..., 0] = True
    expected = query_by_query(q, k, v, 0.1, 0.6, seen=seen)
    hidden = torch.where(seen[..., None], k, torch.full_like(k, 1e3))
    out = local_polynomial(q, hidden, v, seen, ridge=0.1, scale=0.6, solver=solver)
    torch.testing.assert_close(out, expected)
    scores = (0.6 * q @ k.transpose(-1, -2)).masked_fill(
        ~(seen[:, :, None] & torch.ones(TOKENS, TOKENS).tril().bool()), -1e9
    )
    torch.testing.assert_close(local_constant(q, hidden, v, seen, scale=0.6), scores.softmax(dim=-1) @ v)


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_queries_may_be_the_last_of_a_sequence(given, solver):
    q, k, v = given
    whole = local_polynomial(q, k, v, solver=solver)
    torch.testing.assert_close(local_polynomial(q[:, :, 15:], k, v, solver=solver), whole[:, :, 15:])
    whole = local_constant(q, k, v)
    torch.testing.assert_close(local_constant(q[:, :, 15:], k, v), whole[:, :, 15:])


def test_a_query_that_sees_nothing_is_not_nan(given):
    none = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool)
    for out in (local_constant(*given, none), local_polynomial(*given, none), parallax(*given, given[0], none)):
        assert out.isfinite().all()


def test_local_constant_is_softmax_attention(given):
    q, k, v = given
    attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(local_constant(q, k, v), attention)
    k = F.normalize(k, dim=-1)
    torch.testing.assert_close(local_constant(q, k, v, kernel="gaussian"), local_constant(q, k, v))


def test_raw_kernel_favours_long_keys(given):
    """Without normalised keys the dot kernel is the Gaussian one times ``exp(s |k|^2 / 2)``."""
    q, k, v = given
    weights = torch.exp(-0.25 * torch.cdist(q, k).square() + 0.25 * k.square().sum(dim=-1)[:, :, None])
    expected = weights @ v / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(local_constant(q, k, v, causal=False, scale=0.5), expected)


@pytest.mark.parametrize("kernel", ["dot", "gaussian"])
@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_affine_maps_are_exact(given, kernel, solver):
    q, k, _ = given
    slope, shift = torch.randn(KEY, VALUE, dtype=torch.float64), torch.randn(VALUE, dtype=torch.float64)
    settings = {"causal": False, "kernel": kernel, "ridge": 0.0, "solver": solver, "iterations": 12}
    torch.testing.assert_close(local_polynomial(q, k, k @ slope + shift, **settings), q @ slope + shift)
    assert (local_constant(q, k, k @ slope + shift, causal=False) - q @ slope - shift).abs().max() > 0.1


def test_quadratic_maps_are_exact_at_degree_two(given):
    q, k, _ = given
    settings = {"causal": False, "ridge": 0.0, "degree": 2}
    out = local_polynomial(q, k, monomials(k, 2), **settings)
    torch.testing.assert_close(out, monomials(q, 2))


def test_large_ridge_is_softmax_attention(given):
    torch.testing.assert_close(local_polynomial(*given, ridge=1e12), local_constant(*given))


def test_flat_kernel_is_linear_regression_with_intercept(given):
    q, k, v = given
    out = local_polynomial(q, k, v, causal=False, scale=0.0, ridge=0.0)
    design = torch.cat([torch.ones_like(k[..., :1]), k], dim=-1)
    solution = torch.linalg.lstsq(design, v).solution
    torch.testing.assert_close(out, torch.cat([torch.ones_like(q[..., :1]), q], dim=-1) @ solution)


def test_parallax_with_the_solution_is_local_linear(given):
    q, k, v = given
    slope = local_slope(q, k, ridge=0.2)
    torch.testing.assert_close(parallax(q, k, v, slope), local_polynomial(q, k, v, ridge=0.2))
    torch.testing.assert_close(parallax(q, k, v, torch.zeros_like(q)), local_constant(q, k, v))


@pytest.mark.parametrize("window", [1, 5, 100])
def test_window(given, window):
    q, k, v = given
    r = torch.randn_like(q)
    out = parallax(q, k, v, r, window=window)
    for t in (0, 3, 20):
        start = max(0, t + 1 - window)
        part = (q[:, :, t : t + 1], k[:, :, start : t + 1], v[:, :, start : t + 1], r[:, :, t : t + 1])
        torch.testing.assert_close(out[:, :, t : t + 1], parallax(*part, causal=False))
    expected = local_polynomial(q, k, v, window=window, block=3)
    torch.testing.assert_close(local_polynomial(q, k, v, window=window, solver="cg"), expected)


@pytest.mark.parametrize(("solver", "block"), [("direct", 2), ("cg", 3)])
def test_gradients(given, solver, block):
    inputs = [x[:1, :1, :4].clone().requires_grad_() for x in given]
    settings = {"solver": solver, "block": block, "iterations": 4, "scale": 0.4}
    assert torch.autograd.gradcheck(lambda *x: local_polynomial(*x, **settings), inputs)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_nothing_of_the_size_of_a_map_is_held():
    q, k, v = (torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3))
    kept = 0

    def keep(x):
        nonlocal kept
        kept += x.numel()
        return x

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = local_polynomial(q, k, v, solver="cg", iterations=4, block=32)
    assert kept < 512 * 512 / 4  # keys once a block: tokens^2 / block * key_dim numbers in views of one tensor
    with seen:
        out.sum().backward()
    assert seen.numel <= 32 * 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": -1.0}, "0 or above"),
        ({"ridge": float("nan")}, "0 or above"),
        ({"ridge": 0.0}, "without a unique fit"),
        ({"ridge": 0.0, "causal": False, "key": torch.zeros(BATCH, HEADS, TOKENS, KEY).double()}, "span the features"),
        ({"degree": 0}, "at least 1"),
        ({"degree": 2, "solver": "cg"}, "1 for solver 'cg'"),
        ({"window": 0}, "at least 1"),
        ({"window": 3, "causal": False}, "looks back"),
        ({"solver": "cg", "iterations": 0}, "at least one iteration"),
    ],
)
def test_refuses(given, change, message):
    q, k, v = given
    with pytest.raises(ValueError, match=message):
        local_polynomial(**{"query": q, "key": k, "value": v, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "cosine"},
        {"solver": "lu"},
        {"value": torch.zeros(BATCH, HEADS, TOKENS - 1, VALUE).double()},
        {"query": torch.zeros(BATCH, HEADS, TOKENS, KEY + 1).double()},
        {"query": torch.zeros(BATCH, HEADS, TOKENS + 1, KEY).double()},
    ],
)
def test_refuses_by_type_or_value(given, change):
    q, k, v = given
    with pytest.raises((ValueError, TypeCheckError)):
        local_polynomial(**{"query": q, "key": k, "value": v, **change})


def test_parallax_refuses_another_shape_of_r(given):
    with pytest.raises((ValueError, TypeCheckError)):
        parallax(*given, given[0][:, :, 1:])
