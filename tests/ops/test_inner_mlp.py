"""A network trained on the sequence against autograd's gradients, token by token."""

import pytest
import torch
import torch.nn.functional as F

from cenote.ops.inner_mlp import Weights, initial_inner_state, inner_mlp

BATCH, HEADS, TOKENS, KEY, VALUE, HIDDEN = 2, 2, 13, 5, 4, 6


@pytest.fixture
def given():
    widths = (KEY, KEY, VALUE)
    q, k, v = (torch.randn(BATCH, HEADS, TOKENS, width, dtype=torch.float64) for width in widths)
    step, fading, eta = (torch.rand(BATCH, HEADS, TOKENS, dtype=torch.float64) for _ in range(3))
    first, second = (torch.randn(HEADS, *shape, dtype=torch.float64) / 2 for shape in ((KEY, HIDDEN), (HIDDEN, VALUE)))
    return (q, k, v, step * 0.3), {"log_decay": -fading, "log_momentum": eta.log()}, Weights(first, second)


def by_autograd(tokens, gates, weights, batch_tokens, item, head):
    """One item and head, as the definition says."""
    q, k, v, step = (x[item, head] for x in tokens)
    kept, eta = gates["log_decay"][item, head].exp(), gates["log_momentum"][item, head].exp()
    now = [w[head] for w in weights]
    speed, outputs = [torch.zeros_like(w) for w in now], []
    for t in range(len(q)):
        if t % batch_tokens == 0:
            start = now

        def loss(w, t=t):
            return (F.gelu(k[t] @ w[0]) @ w[1] - v[t]).square().sum() / 2

        gradient = torch.func.grad(loss)(start)
        speed = [eta[t] * z - step[t] * g for z, g in zip(speed, gradient, strict=True)]
        now = [kept[t] * w + z for w, z in zip(now, speed, strict=True)]
        outputs.append(F.gelu(q[t] @ now[0]) @ now[1])
    return torch.stack(outputs), now


@pytest.mark.parametrize("batch_tokens", [1, 4, 5, 32])
def test_is_gradient_descent(given, batch_tokens):
    tokens, gates, weights = given
    out, state = inner_mlp(*tokens, initial_inner_state(weights, BATCH), **gates, batch_tokens=batch_tokens)
    for item, head in ((0, 0), (1, 1)):
        expected, now = by_autograd(tokens, gates, weights, batch_tokens, item, head)
        torch.testing.assert_close(out[item, head], expected)
        torch.testing.assert_close([w[item, head] for w in state.now], now)


@pytest.mark.parametrize("batch_tokens", [1, 4, 5])
def test_cut_anywhere(given, batch_tokens):
    tokens, gates, weights = given
    whole, last = inner_mlp(*tokens, initial_inner_state(weights, BATCH), **gates, batch_tokens=batch_tokens)
    state, parts = initial_inner_state(weights, BATCH), []
    for part in (slice(0, 1), slice(1, 2), slice(2, 8), slice(8, 13)):
        cut = {name: gate[:, :, part] for name, gate in gates.items()}
        out, state = inner_mlp(*(x[:, :, part] for x in tokens), state, **cut, batch_tokens=batch_tokens)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("batch_tokens", [1, 4])
def test_padding_anywhere_is_as_if_it_were_not_there(given, batch_tokens):
    tokens, gates, weights = given
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, [0, 3, 4, 12]] = False
    keep = mask[0]
    settings = {"batch_tokens": batch_tokens}
    padded, state = inner_mlp(*tokens, initial_inner_state(weights, BATCH), **gates, mask=mask, **settings)
    short = {name: gate[:1, :, keep] for name, gate in gates.items()}
    out, after = inner_mlp(*(x[:1, :, keep] for x in tokens), initial_inner_state(weights, 1), **short, **settings)
    torch.testing.assert_close(padded[:1, :, keep], out)
    torch.testing.assert_close([w[:1] for w in state.now], list(after.now))
    assert state.filled[0].tolist() == after.filled[0].tolist()


def test_gates_left_out_are_neutral(given):
    (*pairs, step), _, weights = given
    tokens, state = (*pairs, step / 10), initial_inner_state(weights, BATCH)  # small steps, which do not run away
    none = {"log_decay": torch.zeros_like(tokens[3]), "log_momentum": torch.full_like(tokens[3], -1e3)}
    torch.testing.assert_close(inner_mlp(*tokens, state)[0], inner_mlp(*tokens, state, **none)[0])


def test_gradients(given):
    tokens, gates, weights = given
    inputs = [x[:1, :1, :3].clone().requires_grad_() for x in tokens]
    inputs += [w[:1].clone().requires_grad_() for w in weights]
    cut = {name: gate[:1, :1, :3] for name, gate in gates.items()}

    def call(q, k, v, step, first, second):
        return inner_mlp(q, k, v, step, initial_inner_state(Weights(first, second), 1), **cut, batch_tokens=2)[0]

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 0}, "at least 1"),
        ({"log_decay": torch.ones(BATCH, HEADS, TOKENS, dtype=torch.float64)}, "log_decay from -inf to 0"),
        ({"step": torch.full((BATCH, HEADS, TOKENS), 3.0, dtype=torch.float64)}, "step from 0 to 2"),
    ],
)
def test_refuses(given, change, message):
    (q, k, v, step), _, weights = given
    call = {"query": q, "key": k, "value": v, "step": step, "state": initial_inner_state(weights, BATCH), **change}
    with pytest.raises(ValueError, match=message):
        inner_mlp(**call)


def test_refuses_a_state_with_nan(given):
    tokens, _, weights = given
    state = initial_inner_state(Weights(weights.first * float("nan"), weights.second), BATCH)
    with pytest.raises(ValueError, match="NaN"):
        inner_mlp(*tokens, state)
