"""Selections against sorting by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.ops.selection import select_mass, select_threshold, select_topk


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 9))
def test_topk_takes_the_best_allowed(seed, k, items):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, items, generator=generator)
    allowed = torch.rand(3, items, generator=generator) < 0.6
    chosen = select_topk(scores, k, allowed)
    for row in range(3):
        open_to = [item for item in range(items) if allowed[row, item]]
        best = sorted(open_to, key=lambda item: -scores[row, item])[:k]
        assert chosen[row].nonzero().flatten().tolist() == sorted(best)


def test_an_allowed_minus_infinity_comes_before_what_is_not_allowed():
    scores = torch.tensor([[float("-inf"), 3.0]])
    assert select_topk(scores, 1, torch.tensor([[True, False]])).tolist() == [[True, False]]


def test_threshold_is_strict_and_keeps_the_best_of_a_row_that_has_none():
    scores = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.2, 0.15]])
    assert select_threshold(scores, 0.3).tolist() == [[True, False, False], [False, True, False]]
    assert not select_threshold(scores, 0.3, keep_best=False)[1].any()


@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.integers(1, 4))
def test_mass_takes_one_more_than_stays_below(seed, mass, least):
    shares = torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    chosen = select_mass(shares, mass, least)
    for row in range(2):
        count = 0
        ordered = shares[row].sort(descending=True).values
        while count < 7 and float(ordered[: count + 1].cumsum(0)[-1]) <= mass:
            count += 1
        count = min(max(count + 1, least), 7)
        assert int(chosen[row].sum()) == count
        assert float(shares[row][chosen[row]].min()) == float(ordered[count - 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: select_topk(x, 0), "k must be at least 1"),
        (lambda x: select_mass(x, 0.0), "mass"),
        (lambda x: select_mass(x, 1.5), "mass"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 3))
