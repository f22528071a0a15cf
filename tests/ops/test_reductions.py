"""Masked reductions: padding never matters, and a row without real tokens is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.ops.masked import masked_max, masked_mean, masked_softmax
from cenote.ops.positions import first_real, last_real, take_token
from cenote.ops.power import clamped_fraction, power_mean
from cenote.ops.statistics import masked_statistics, weighted_statistics
from cenote.ops.topk import masked_topk

GARBAGE = [0.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")]


def softmax_over_tokens(x, mask=None):
    """Mean of the tokens under the softmax of their first channel, with the weights read from ``masked_softmax``."""
    weights = masked_softmax(x[..., 0], mask)
    if mask is not None:
        assert bool((weights[~mask] == 0).all())
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
    return (weights.unsqueeze(-1) * x).sum(1)


REDUCTIONS = {
    "mean": masked_mean,
    "max": masked_max,
    "softmax": softmax_over_tokens,
    "power_mean": lambda x, mask=None: power_mean(x, torch.tensor([3.0]), mask),
    "statistics": lambda x, mask=None: torch.cat(masked_statistics(x, mask), dim=1),
    "top 2": lambda x, mask=None: masked_topk(x.transpose(1, 2), 2, mask).values.flatten(1),
    "first": lambda x, mask=None: x[:, 0] if mask is None else take_token(x, first_real(mask)),
    "last": lambda x, mask=None: x[:, -1] if mask is None else take_token(x, last_real(mask)),
}

padded_rows = st.lists(
    st.tuples(st.integers(2, 6), st.integers(0, 4), st.integers(0, 4), st.sampled_from(GARBAGE)), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", REDUCTIONS)
@settings(deadline=None, max_examples=25)
@given(rows=padded_rows, seed=st.integers(0, 1000))
def test_padding_never_matters(name, rows, seed):
    reduce = REDUCTIONS[name]
    generator = torch.Generator().manual_seed(seed)
    width = max(left + real + right for real, left, right, _ in rows)
    padded, mask, alone = torch.empty(len(rows), width, 3), torch.zeros(len(rows), width, dtype=torch.bool), []
    for b, (real, left, _, garbage) in enumerate(rows):
        x = torch.randn(1, real, 3, generator=generator)
        padded[b] = garbage
        padded[b, left : left + real] = x
        mask[b, left : left + real] = True
        alone.append(reduce(x))
    padded.requires_grad_()
    result = reduce(padded, mask)
    torch.testing.assert_close(result, torch.cat(alone), rtol=1e-6, atol=1e-6)
    if name != "softmax":
        (grad,) = torch.autograd.grad(result.sum(), padded)
        assert bool(grad.isfinite().all())
        assert bool((grad[~mask] == 0).all())


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_row_without_real_tokens_is_refused(name):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        REDUCTIONS[name](torch.randn(2, 3, 3), mask)


def test_clamped_fraction_counts_real_entries_only():
    x = torch.tensor([[[-1.0, 2.0], [3.0, -4.0], [-9.0, -9.0]]])
    assert clamped_fraction(x).item() == pytest.approx(4 / 6)
    assert clamped_fraction(x, torch.tensor([[True, True, False]])).item() == pytest.approx(0.5)


def test_statistics_are_those_of_each_row():
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    mask = torch.rand(3, 7) < 0.6
    mask[:, 2] = True
    mean, deviation = masked_statistics(x, mask, floor=1e-12)
    for b in range(3):
        real = x[b, mask[b]]
        torch.testing.assert_close(mean[b], real.mean(0))
        expected = real.var(0, correction=0).clamp(min=1e-12).sqrt()
        torch.testing.assert_close(deviation[b], expected)


def test_deviation_survives_a_large_mean():
    x = torch.randn(2, 50, 3)
    _, deviation = masked_statistics(x + 1000.0)
    torch.testing.assert_close(deviation, x.std(dim=1, correction=0), rtol=1e-3, atol=1e-3)


def test_equal_tokens_give_the_floor_and_a_finite_gradient():
    x = torch.ones(1, 4, 2, requires_grad=True)
    _, deviation = weighted_statistics(x, torch.full((1, 4, 1), 0.25), floor=1e-4)
    torch.testing.assert_close(deviation, torch.full((1, 2), 1e-2))
    assert bool(torch.autograd.grad(deviation.sum(), x)[0].isfinite().all())
    with pytest.raises(ValueError, match="floor"):
        masked_statistics(torch.ones(1, 4, 2), floor=0.0)
