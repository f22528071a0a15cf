"""Ridge regression at every token against solving the sums token by token, and against scikit-learn."""

import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.linear_model import Ridge

from cenote.ops.delta_rule import chunk_delta_rule
from cenote.ops.linear_recurrence import chunk_linear
from cenote.ops.ridge_recurrence import RidgeState, initial_ridge_state, ridge_recurrence

BATCH, HEADS, TOKENS, KEY, VALUE = 2, 2, 23, 5, 4


@pytest.fixture
def given():
    q, k = (torch.randn(BATCH, HEADS, TOKENS, KEY, dtype=torch.float64) for _ in range(2))
    v = torch.randn(BATCH, HEADS, TOKENS, VALUE, dtype=torch.float64)
    g, beta = (torch.rand(BATCH, HEADS, TOKENS, dtype=torch.float64) for _ in range(2))
    return q, k, v, 0.1 + torch.rand(HEADS, KEY, dtype=torch.float64), -g, 2 * beta


def token_by_token(q, k, v, ridge, g, beta):
    gram, cross = initial_ridge_state(k, v.shape[-1])
    outputs = []
    for t in range(q.shape[2]):
        kept, row = g[:, :, t, None, None].exp(), k[:, :, t]
        weighted = beta[:, :, t, None] * row
        gram = kept * gram + torch.einsum("bhi,bhj->bhij", weighted, row)
        cross = kept * cross + torch.einsum("bhi,bhj->bhij", weighted, v[:, :, t])
        solved = torch.linalg.solve(gram + torch.diag_embed(ridge), q[:, :, t, :, None])
        outputs.append((cross * solved).sum(dim=2))
    return torch.stack(outputs, dim=2), RidgeState(gram, cross)


@pytest.mark.parametrize("solver", ["direct", "cg"])
@pytest.mark.parametrize("block", [1, 7, 32])
def test_is_the_solution_at_every_token(given, solver, block):
    expected, state = token_by_token(*given)
    out, after = ridge_recurrence(*given, solver=solver, block=block)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.gram, state.gram)
    torch.testing.assert_close(after.cross, state.cross)


def test_cut_anywhere(given):
    q, k, v, ridge, g, beta = given
    whole, last = ridge_recurrence(q, k, v, ridge, g, beta)
    state, parts = None, []
    for part in (slice(0, 1), slice(1, 9), slice(9, 23)):
        out, state = ridge_recurrence(
            *(x[:, :, part] for x in (q, k, v)), ridge, g[:, :, part], beta[:, :, part], state
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, last)


def test_full_reset_forgets(given):
    q, k, v, ridge, g, beta = given
    reset = g.clone()
    reset[:, :, 10] = float("-inf")
    out = ridge_recurrence(q, k, v, ridge, reset, beta)[0]
    fresh = ridge_recurrence(*(x[:, :, 10:] for x in (q, k, v)), ridge, g[:, :, 10:], beta[:, :, 10:])[0]
    torch.testing.assert_close(out[:, :, 10:], fresh)


def test_is_scikit_learn(given):
    q, k, v, _, g, beta = given
    out = ridge_recurrence(q, k, v, 0.3, g, beta)[0]
    for t in (0, 3, TOKENS - 1):
        decay = g[0, 1, : t + 1].flip(0).cumsum(0).flip(0).roll(-1)
        decay[-1] = 0
        weight = (decay.exp() * beta[0, 1, : t + 1]).numpy()
        model = Ridge(alpha=0.3, fit_intercept=False).fit(k[0, 1, : t + 1], v[0, 1, : t + 1], sample_weight=weight)
        torch.testing.assert_close(out[0, 1, t], torch.from_numpy(model.predict(q[0, 1, t : t + 1].numpy())[0]))


def test_orthonormal_keys_make_it_linear_attention_and_the_delta_rule():
    keys = torch.linalg.qr(torch.randn(2, 2, 6, 6, dtype=torch.float64))[0]
    q, v = torch.randn(2, 2, 6, 6, dtype=torch.float64), torch.randn(2, 2, 6, 3, dtype=torch.float64)
    linear = chunk_linear(q, keys, v)[0]
    torch.testing.assert_close(chunk_delta_rule(q, keys, v, torch.ones(2, 2, 6, dtype=torch.float64))[0], linear)
    past = RidgeState(torch.zeros(2, 2, 6, 6, dtype=torch.float64), torch.zeros(2, 2, 6, 3, dtype=torch.float64))
    # Ridge 0 needs all six keys; what is left of the first five tokens is the limit of a vanishing ridge.
    vanishing = ridge_recurrence(keys, keys, v, 1e-9, state=past)[0]
    torch.testing.assert_close(vanishing, chunk_linear(keys, keys, v)[0], rtol=1e-6, atol=1e-6)
    state = ridge_recurrence(q, keys, v, 1.0)[1]
    none = torch.zeros(2, 2, 1, dtype=torch.float64)
    exact = ridge_recurrence(q[:, :, -1:], keys[:, :, :1], v[:, :, :1], 0.0, weight=none, state=state)[0]
    torch.testing.assert_close(exact, linear[:, :, -1:])


def test_neutral_tokens_change_nothing(given):
    q, k, v, ridge, g, beta = given
    none = torch.zeros_like(g[:, :, :3])
    out, state = ridge_recurrence(q, k, v, ridge, g, beta)
    longer, after = ridge_recurrence(
        *(torch.cat([x, torch.zeros_like(x[:, :, :3])], dim=2) for x in (q, k, v)),
        ridge,
        torch.cat([g, none], dim=2),
        torch.cat([beta, none], dim=2),
    )
    torch.testing.assert_close(longer[:, :, :TOKENS], out)
    torch.testing.assert_close(after, state)


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_gradients(given, solver):
    q, k, v, ridge, g, beta = given
    inputs = [x[:1, :1, :4].clone().requires_grad_() for x in (q, k, v)]
    inputs += [ridge[:1].clone().requires_grad_(), *(x[:1, :1, :4].clone().requires_grad_() for x in (g, beta))]
    assert torch.autograd.gradcheck(lambda *x: ridge_recurrence(*x, solver=solver, block=3)[0], inputs)


def test_half_the_iterations_are_already_close(given):
    q, k, v, ridge, g, beta = given
    exact = ridge_recurrence(q, k, v, ridge, g, beta)[0]
    errors = [
        (ridge_recurrence(q, k, v, ridge, g, beta, solver="cg", iterations=n)[0] - exact).norm() for n in (1, 3, 5)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": -0.1}, "above 0"),
        ({"ridge": 0.0}, "span the key space"),
        ({"ridge": float("nan")}, "above 0"),
        ({"log_decay": torch.full((BATCH, HEADS, TOKENS), 0.1, dtype=torch.float64)}, "log_decay from -inf to 0"),
        ({"weight": torch.full((BATCH, HEADS, TOKENS), 2.1, dtype=torch.float64)}, "weight from 0 to 2"),
        ({"block": 0}, "at least one"),
        ({"solver": "cg", "iterations": -1}, "at least one iteration"),
    ],
)
def test_refuses(given, change, message):
    q, k, v, ridge, _, _ = given
    with pytest.raises(ValueError, match=message):
        ridge_recurrence(**{"query": q, "key": k, "value": v, "ridge": ridge, **change})


@pytest.mark.parametrize("change", [{"solver": "lu"}, {"key": torch.zeros(BATCH, HEADS, TOKENS, KEY + 1).double()}])
def test_refuses_by_type_or_value(given, change):
    q, k, v, ridge, _, _ = given
    with pytest.raises((ValueError, TypeCheckError)):
        ridge_recurrence(**{"query": q, "key": k, "value": v, "ridge": ridge, **change})
