"""Top-k among real tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.ops.topk import masked_topk


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 9), k=st.integers(1, 12), heads=st.integers(1, 3), seed=st.integers(0, 999))
def test_agrees_with_sorting_the_real_tokens_of_each_row(tokens, k, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, heads, tokens, generator=generator)
    mask = torch.rand(3, tokens, generator=generator) < 0.5
    mask[torch.arange(3), torch.randint(tokens, (3,), generator=generator)] = True
    best = masked_topk(scores.masked_fill(~mask.unsqueeze(1), 1e9), k, mask)
    assert best.indices.shape[-1] == min(k, tokens)
    for b in range(3):
        for h in range(heads):
            real = sorted(((scores[b, h, n].item(), n) for n in range(tokens) if mask[b, n]), reverse=True)[:k]
            count = len(real)
            assert best.mask[b, h].tolist() == [True] * count + [False] * (min(k, tokens) - count)
            assert best.indices[b, h, :count].tolist() == [n for _, n in real]
            assert best.values[b, h, :count].tolist() == [score for score, _ in real]
            assert bool((best.values[b, h, count:] == float("-inf")).all())
    # Unused places name a real token too, so that gathering with the indices never reads padding.
    assert bool(mask.unsqueeze(1).expand_as(scores).gather(-1, best.indices).all())


def test_padding_does_not_win_against_minus_infinity():
    scores = torch.tensor([[5.0, float("-inf"), float("nan"), 1.0]])
    best = masked_topk(scores, 2, torch.tensor([[False, True, False, True]]))
    assert best.indices.tolist() == [[3, 1]]
    assert best.values.tolist() == [[1.0, float("-inf")]]
    assert best.mask.tolist() == [[True, True]]


def test_without_a_mask_it_is_topk():
    scores = torch.randn(2, 7)
    torch.testing.assert_close(masked_topk(scores, 3).values, scores.topk(3).values)
    assert bool(masked_topk(scores, 3).mask.all())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="k must be at least 1"):
        masked_topk(torch.randn(2, 4), 0)
    with pytest.raises(ValueError, match="real token"):
        masked_topk(torch.randn(1, 2), 1, torch.zeros(1, 2, dtype=torch.bool))
