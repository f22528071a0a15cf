"""The power mean: exact identities, bounds, gradients, and its peer in PyTorch Geometric."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.ops.power import power_mean


def positive(seed=0, dtype=torch.float32, spread=3.0):
    """Positive tokens over several orders of magnitude, ``(3, 16, 5)``."""
    return (
        (torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread)
        .exp()
        .to(dtype)
    )


def exponent(p, dtype=torch.float32):
    return torch.tensor([p], dtype=dtype)


def plain(x, p, eps=1e-6):
    """The definition, in float64."""
    return x.double().clamp(min=eps).pow(p).mean(dim=1).pow(1 / p)


def test_one_is_the_mean():
    torch.testing.assert_close(power_mean(positive(), exponent(1.0)), positive().mean(dim=1))


def test_towards_zero_is_the_geometric_mean():
    x = positive(spread=0.5, dtype=torch.float64)
    torch.testing.assert_close(
        power_mean(x, exponent(1e-6, torch.float64)), x.log().mean(dim=1).exp(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("p", [1.0, 3.0, 10.0, 64.0])
def test_single_precision_agrees_with_double(p):
    for signed in (False, True):
        x = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(1)) if signed else positive(spread=1.0)
        torch.testing.assert_close(power_mean(x, exponent(p)).double(), plain(x, p), rtol=1e-5, atol=1e-9)


def test_a_thousand_is_nearly_the_maximum():
    top, pooled = positive().amax(dim=1), power_mean(positive(), exponent(1000.0))
    # f = max * (k/N)^(1/p), so it falls short by at most ln(N)/p of the maximum; 1e-5 for rounding.
    assert bool((pooled <= top * (1 + 1e-5)).all())
    assert bool((pooled >= top * (1 - torch.tensor(16.0).log() / 1000 - 1e-5)).all())


@settings(deadline=None, max_examples=25)
@given(p=st.floats(0.02, 100), q=st.floats(0.02, 100), scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_bounds_monotony_and_scaling(p, q, scale, seed):
    x = positive(seed, torch.float64, spread=1.0)
    low, high = (power_mean(x, exponent(e, torch.float64)) for e in sorted((p, q)))
    slack = 1 + 1e-9
    assert bool((low <= high * slack).all())
    assert bool((high <= x.amax(dim=1) * slack).all())
    assert bool((low * slack >= x.amin(dim=1)).all())
    torch.testing.assert_close(
        power_mean(scale * x, exponent(p, torch.float64)), scale * power_mean(x, exponent(p, torch.float64))
    )


def test_tiny_and_huge_values_stay_in_range():
    x = torch.tensor([[[1e-30, 1e30], [1e-30, 1e30]]])
    torch.testing.assert_close(power_mean(x, exponent(100.0), eps=1e-35), x[:, 0], rtol=1e-4, atol=0)
    half = torch.full((1, 4, 2), 4e4, dtype=torch.float16)
    torch.testing.assert_close(power_mean(half, exponent(64.0)), half[:, 0])


def test_gradients():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.5, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [False, True, True, True, False, False]])
    # Values within the finite-difference step of the clamp have no derivative.
    x = torch.where(x.detach().abs() < 1e-2, torch.full_like(x, 0.5), x.detach()).requires_grad_()
    assert torch.autograd.gradcheck(power_mean, (x, p))
    assert torch.autograd.gradcheck(lambda x, p: power_mean(x, p, mask), (x, p))
    (grad,) = torch.autograd.grad(power_mean(x, p).sum(), x)
    assert bool((grad[x < 0] == 0).all())


def test_bad_eps_is_refused():
    with pytest.raises(ValueError, match="eps must be positive"):
        power_mean(positive(), exponent(3.0), eps=0.0)


def test_agrees_with_pytorch_geometric():
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    p = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0])
    x = torch.rand(3, 16, 5) * 2 + 1e-3
    peer = aggr.PowerMeanAggregation(learn=True, channels=5)
    peer.p.data.copy_(p)
    torch.testing.assert_close(power_mean(x, p, eps=1e-4), peer(x.flatten(0, 1), torch.arange(3).repeat_interleave(16)))
