"""Delta rules, momentum and mini-batches in chunks and in one step, against the loops; the triangular solver."""

import pytest
import torch
import torch.nn.functional as F

from cenote.ops.delta_rule import chunk_delta_rule, implicit_step, normalised_step, step_delta_rule
from cenote.ops.momentum_rule import chunk_mini_batch, chunk_momentum, step_momentum
from cenote.ops.triangular import solve_unit_lower
from reference import recurrences

B, H, K, V = 2, 3, 6, 4


def numbers(tokens, pairs=1, dtype=torch.float64):
    q = torch.randn(B, H, tokens, K, dtype=dtype)
    k = F.normalize(torch.randn(B, H, pairs * tokens, K, dtype=dtype), dim=-1)
    v = torch.randn(B, H, pairs * tokens, V, dtype=dtype)
    return q, k, v, torch.randn(B, H, K, V, dtype=dtype)


def steps(rows):
    return 2 * torch.rand(B, H, rows, dtype=torch.float64)


def log_decay(tokens, strength=2.0):
    return strength * F.logsigmoid(torch.randn(B, H, tokens, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 7, 8, 40, 64, 72])
def test_triangular_systems_are_solved_and_only_their_lower_part_is_read(size):
    lower, right = torch.randn(3, size, size, dtype=torch.float64) / size, torch.randn(3, size, 5, dtype=torch.float64)
    full = torch.eye(size, dtype=torch.float64) + lower.tril(-1)
    torch.testing.assert_close(solve_unit_lower(lower, right), torch.linalg.solve(full, right))


def test_triangular_solver_is_stable_where_powers_of_the_matrix_are_huge():
    # All keys equal and beta 1: entries of L^32 reach 1e18, the solution stays small.
    lower, right = torch.ones(1, 64, 64), torch.randn(1, 64, 3)
    expected = torch.cat([right[:, :1], right[:, 1:] - right[:, :-1]], 1)
    torch.testing.assert_close(solve_unit_lower(lower, right), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (7, 4), (19, 8), (19, 16), (19, None), (16, 1)])
def test_chunks_of_any_length_are_the_loop(gated, pairs, tokens, size):
    q, k, v, state = numbers(tokens, pairs)
    beta, g = steps(pairs * tokens), log_decay(tokens) if gated else None
    out, after = chunk_delta_rule(q, k, v, beta, g, state, chunk_size=size, scale=0.4)
    expected, final = recurrences.delta(q, k, v, beta, g, state, 0.4)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, final)


@pytest.mark.parametrize("pairs", [1, 2])
def test_steps_and_stretches_hand_the_state_on(pairs):
    q, k, v, state = numbers(13, pairs)
    beta, g = steps(13 * pairs), log_decay(13)
    expected, final = recurrences.delta(q, k, v, beta, g, state)
    outs, now = [], state
    for t in range(5):
        rows = slice(pairs * t, pairs * (t + 1))
        at = q[:, :, t : t + 1], k[:, :, rows], v[:, :, rows], beta[:, :, rows], g[:, :, t : t + 1]
        out, now = step_delta_rule(*at, now)
        outs.append(out)
    rest = (x[:, :, 5 * pairs :] for x in (k, v, beta))
    out, now = chunk_delta_rule(q[:, :, 5:], *rest, g[:, :, 5:], now, chunk_size=8)
    torch.testing.assert_close(torch.cat([*outs, out], 2), expected)
    torch.testing.assert_close(now, final)


def test_a_full_reset_forgets_everything_and_breaks_nothing():
    q, k, v, state = numbers(20)
    beta, g = steps(20), log_decay(20)
    g[:, :, 6] = -torch.inf
    inputs = [x.requires_grad_() for x in (q, k, v, beta, g, state)]
    out, after = chunk_delta_rule(*inputs, chunk_size=16)
    alone, final = recurrences.delta(*(x[:, :, 6:] for x in (q, k, v, beta, g)))
    torch.testing.assert_close(out[:, :, 6:], alone)
    torch.testing.assert_close(after, final)
    (out.sum() + after.sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in inputs)
    assert float(state.grad[..., 0].abs().max()) > 0


def test_many_resets_keep_the_precision_of_float32():
    q, k, v, state = (x.float() for x in numbers(64))
    beta, g = steps(64).float(), log_decay(64, 0.1).float()
    g[:, :, :26] = -torch.inf
    out, after = chunk_delta_rule(q, k, v, beta, g, state, chunk_size=32)
    exact = recurrences.delta(*(x.double() for x in (q, k, v, beta, g, state)))
    torch.testing.assert_close((out.double(), after.double()), exact, rtol=1e-5, atol=1e-5)


def test_strong_decays_in_float32():
    q, k, v, state = (x.float() for x in numbers(128))
    beta, g = steps(128).float(), log_decay(128, 40.0).float()
    out, _ = chunk_delta_rule(q, k, v, beta, g, state)
    expected, _ = recurrences.delta(q, k, v, beta, g, state)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pairs", [1, 2])
def test_gradients_of_chunks_and_loop_agree(pairs):
    q, k, v, state = (x[:1, :1] for x in numbers(9, pairs))
    inputs = [x.requires_grad_() for x in (q, k, v, steps(9 * pairs)[:1, :1], log_decay(9)[:1, :1], state)]

    def run(function, **options):
        out, after = function(*inputs, **options)
        return torch.autograd.grad(out.sin().sum() + after.cos().sum(), inputs)

    for ours, theirs in zip(run(chunk_delta_rule, chunk_size=8), run(recurrences.delta), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda *x: chunk_delta_rule(*x, chunk_size=8), inputs)


def test_reductions_of_the_gated_rule():
    q, k, v, state = numbers(10)
    beta, g = steps(10), log_decay(10)
    torch.testing.assert_close(
        chunk_delta_rule(q, k, v, beta, torch.zeros_like(g), state), chunk_delta_rule(q, k, v, beta, None, state)
    )
    out, after = chunk_delta_rule(q, k, v, torch.zeros_like(beta), g, state)
    left = g.cumsum(2).exp()
    torch.testing.assert_close(out, left.unsqueeze(-1) * (q @ state))
    torch.testing.assert_close(after, left[:, :, -1, None, None] * state)


def test_a_full_step_with_a_unit_key_recalls_the_latest_pair():
    _, k, v, state = numbers(10)
    out, after = chunk_delta_rule(k, k, v, torch.ones(B, H, 10, dtype=torch.float64), None, state)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close((k[:, :, -1:] @ after), v[:, :, -1:])


def test_orthonormal_keys_make_delta_linear_and_least_squares_one():
    rows = torch.linalg.qr(torch.randn(B, H, K, K, dtype=torch.float64)).Q
    q, _, v, _ = numbers(K)
    out, after = chunk_delta_rule(q, rows, v, torch.ones(B, H, K, dtype=torch.float64))
    linear, final = recurrences.linear(q, rows, v)
    torch.testing.assert_close(out, linear)
    torch.testing.assert_close(after, final)
    torch.testing.assert_close(after, torch.linalg.solve(rows.transpose(-1, -2) @ rows, rows.transpose(-1, -2) @ v))


def test_the_implicit_step_is_the_proximal_minimum():
    _, k, v, state = numbers(1)
    k, alpha = 1.7 * k, 3 * torch.rand(B, H, 1, dtype=torch.float64)
    _, after = step_delta_rule(k, k, v, implicit_step(k, alpha), None, state)
    # Stationary point of |S - S_before|^2 + alpha |S^T k - v|^2.
    slope = after - state + alpha.unsqueeze(-1) * k.transpose(-1, -2) @ (k @ after - v)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_implicit_and_normalised_steps_at_their_limits():
    k = F.normalize(torch.randn(2, 3, 5, K, dtype=torch.float64), dim=-1)
    one = torch.ones(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(implicit_step(k, 1e12 * one), one)
    torch.testing.assert_close(implicit_step(k, 0 * one), 0 * one)
    torch.testing.assert_close(normalised_step(2 * k, 1e-12), one / 4)


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (7, 4), (19, 8), (19, None)])
def test_momentum_in_chunks_is_the_loop(tokens, size):
    q, k, v, state = numbers(tokens)
    theta, log_eta, g = steps(tokens) / 2, log_decay(tokens), log_decay(tokens, 0.2)
    state = state, torch.randn_like(state)
    out, after = chunk_momentum(q, k, v, theta, log_eta, g, state, chunk_size=size)
    expected, final = recurrences.momentum(q, k, v, theta, log_eta.exp(), 1 - g.exp(), state)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, final)
    outs, now = [], state
    for t in range(tokens):
        out, now = step_momentum(*(x[:, :, t : t + 1] for x in (q, k, v, theta, log_eta, g)), now)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected)
    torch.testing.assert_close(now, final)


def test_momentum_without_momentum_is_plain_descent():
    q, k, v, state = numbers(9)
    theta, zero = steps(9) / 2, torch.zeros(B, H, 9, dtype=torch.float64)
    none = torch.full_like(zero, -torch.inf)
    out, (now, _) = chunk_momentum(q, k, v, theta, none, zero, (state, torch.zeros_like(state)))
    expected = recurrences.delta(q, k, v, theta, None, state)
    torch.testing.assert_close((out, now), expected)


def test_gradients_of_momentum_and_mini_batches():
    q, k, v, state = (x[:1, :1] for x in numbers(7))
    gates = [x[:1, :1] for x in (steps(7) / 2, log_decay(7), log_decay(7, 0.2))]
    inputs = [x.requires_grad_() for x in (q, k, v, *gates, state, torch.randn_like(state))]
    assert torch.autograd.gradcheck(lambda *x: chunk_momentum(*x[:6], x[6:], chunk_size=4)[0], inputs)
    place = torch.ones(1, 1, dtype=torch.long)
    few = [*inputs[:4], *inputs[6:]]
    assert torch.autograd.gradcheck(lambda *x: chunk_mini_batch(*x[:4], (*x[4:], place), batch_tokens=3)[0], few)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_mini_batches_are_the_loop_wherever_the_sequence_is_cut(size):
    q, k, v, _ = numbers(19)
    beta = steps(19) / 2
    expected, final = recurrences.mini_batch(q, k, v, beta, size)
    zero = torch.zeros(B, H, K, V, dtype=torch.float64)
    state, outs = (zero, zero, torch.zeros(B, H, dtype=torch.long)), []
    for begin, end in ((0, 3), (3, 4), (4, 12), (12, 19)):
        out, state = chunk_mini_batch(*(x[:, :, begin:end] for x in (q, k, v, beta)), state, batch_tokens=size)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected)
    torch.testing.assert_close(state[0], final)


def test_mini_batches_of_one_token_are_the_delta_rule():
    q, k, v, _ = numbers(9)
    beta = steps(9)
    zero = torch.zeros(B, H, K, V, dtype=torch.float64)
    out, (now, _, _) = chunk_mini_batch(
        q, k, v, beta, (zero, zero, torch.zeros(B, H, dtype=torch.long)), batch_tokens=1
    )
    torch.testing.assert_close((out, now), recurrences.delta(q, k, v, beta))
