"""Linear recurrences in chunks and in one step, against the loop; the convolution in front of them."""

import pytest
import torch
import torch.nn.functional as F

from cenote.ops.linear_recurrence import (
    add_normaliser,
    chunk_feature_decay,
    chunk_linear,
    divide_by_normaliser,
    elu_features,
    retention_log_decay,
    step_linear,
)
from cenote.ops.short_convolution import short_convolution
from reference import recurrences

B, H, K, V = 2, 3, 5, 4


def numbers(tokens, dtype=torch.float64):
    q, k = torch.randn(2, B, H, tokens, K, dtype=dtype)
    v = torch.randn(B, H, tokens, V, dtype=dtype)
    return q, k, v, torch.randn(B, H, K, V, dtype=dtype)


def decays(kind, tokens):
    if kind == "none":
        return None
    g = F.logsigmoid(torch.randn(B, H, tokens, *((K,) if kind == "feature" else ()), dtype=torch.float64))
    return 4 * g


def chunked(kind):
    return chunk_feature_decay if kind == "feature" else chunk_linear


KINDS = pytest.mark.parametrize("kind", ["none", "head", "feature"])


@KINDS
@pytest.mark.parametrize("tokens", [1, 7, 16, 19])
@pytest.mark.parametrize("size", [1, 4, 8, 64, None])
def test_chunks_of_any_length_are_the_loop(kind, tokens, size):
    q, k, v, state = numbers(tokens)
    g = decays(kind, tokens)
    out, after = chunked(kind)(q, k, v, g, state, chunk_size=size, scale=0.3)
    expected, final = recurrences.linear(q, k, v, g, state, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, final)


@KINDS
def test_steps_and_stretches_hand_the_state_on(kind):
    q, k, v, state = numbers(13)
    g = decays(kind, 13)
    expected, final = recurrences.linear(q, k, v, g, state)
    outs, now = [], state
    for t in range(5):
        at = [x[:, :, t : t + 1] for x in (q, k, v)]
        out, now = step_linear(*at, None if g is None else g[:, :, t : t + 1], now)
        outs.append(out)
    rest = [x[:, :, 5:] for x in (q, k, v)]
    out, now = chunked(kind)(*rest, None if g is None else g[:, :, 5:], now, chunk_size=3)
    torch.testing.assert_close(torch.cat([*outs, out], 2), expected)
    torch.testing.assert_close(now, final)


@pytest.mark.parametrize("kind", ["head", "feature"])
def test_a_full_reset_forgets_everything_and_breaks_nothing(kind):
    q, k, v, state = numbers(12)
    g = decays(kind, 12)
    g[:, :, 5] = -torch.inf
    g.requires_grad_()
    out, after = chunked(kind)(q, k, v, g, state, chunk_size=8)
    alone, final = recurrences.linear(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], g[:, :, 5:])
    torch.testing.assert_close(out[:, :, 5:], alone)
    torch.testing.assert_close(after, final)
    out.sum().backward()
    assert bool(g.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["head", "feature"])
def test_many_resets_and_strong_decays_keep_the_precision_of_float32(kind):
    q, k, v, state = (x.float() for x in numbers(200))
    g = decays(kind, 200).float()
    g[:, :, :40] = -torch.inf
    g[:, :, ::3], g[:, :, 2::5] = -torch.inf, -60.0
    out, after = chunked(kind)(q, k, v, g, state)
    exact = recurrences.linear(*(x.double() for x in (q, k, v, g, state)))
    torch.testing.assert_close((out.double(), after.double()), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["head", "feature"])
def test_strong_decays_do_not_overflow_in_float32(kind):
    q, k, v, state = (x.float() for x in numbers(64))
    g = 10 * decays(kind, 64).float() - 20
    out, _ = chunked(kind)(q, k, v, g, state, chunk_size=32)
    expected, _ = recurrences.linear(q, k, v, g, state)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_no_decay_and_equal_features_are_special_cases():
    q, k, v, state = numbers(11)
    g = decays("head", 11)
    plain = chunk_linear(q, k, v, None, state)
    torch.testing.assert_close(chunk_linear(q, k, v, torch.zeros_like(g), state), plain)
    equal = chunk_feature_decay(q, k, v, g.unsqueeze(-1).expand(-1, -1, -1, K), state)
    torch.testing.assert_close(equal, chunk_linear(q, k, v, g, state))


def test_positive_features_with_a_normaliser_give_a_causal_mean():
    q, k, v, _ = numbers(9)
    q, k = elu_features(q), elu_features(k)
    assert bool((k > 0).all())
    out = divide_by_normaliser(chunk_linear(q, k, add_normaliser(v), chunk_size=4)[0])
    weights = (q @ k.transpose(-1, -2)).tril()
    torch.testing.assert_close(out, weights / weights.sum(-1, keepdim=True) @ v)


def test_retention_decays_are_the_published_ones():
    expected = torch.tensor([31 / 32, 63 / 64, 127 / 128], dtype=torch.float64)
    torch.testing.assert_close(retention_log_decay(3).exp(), expected)


@KINDS
def test_gradients_of_chunks_and_loop_agree(kind):
    q, k, v, state = (x[:1, :1].requires_grad_() for x in numbers(7))
    g = decays(kind, 7)
    g = None if g is None else g[:1, :1].requires_grad_()
    inputs = [x for x in (q, k, v, g, state) if x is not None]

    def run(function, **options):
        out, after = function(q, k, v, g, state, **options)
        return torch.autograd.grad(out.sin().sum() + after.cos().sum(), inputs)

    for ours, theirs in zip(run(chunked(kind), chunk_size=3), run(recurrences.linear), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda *x: chunked(kind)(q, k, v, g, state, chunk_size=3), inputs)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_short_convolution_is_causal_and_goes_on(size):
    x, weight = torch.randn(2, 9, 3), torch.randn(3, 1, size)
    whole, last = short_convolution(x, weight)
    padded = F.pad(x, (0, 0, size - 1, 0))
    for t in range(9):
        expected = torch.einsum("bld,dl->bd", padded[:, t : t + size], weight[:, 0])
        torch.testing.assert_close(whole[:, t], expected)
    first, past = short_convolution(x[:, :4], weight)
    second, end = short_convolution(x[:, 4:], weight, past)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_short_convolution_does_not_remember_padding():
    x, weight = torch.randn(3, 5, 2), torch.randn(2, 1, 4)
    past = torch.randn(3, 3, 2)
    _, after = short_convolution(x, weight, past, counts=torch.tensor([5, 2, 0]))
    torch.testing.assert_close(after[0], x[0, 2:])
    torch.testing.assert_close(after[1], torch.cat([past[1, 2:], x[1, :2]]))
    torch.testing.assert_close(after[2], past[2])


def test_a_chunk_size_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        chunk_linear(*numbers(3)[:3], chunk_size=0)
