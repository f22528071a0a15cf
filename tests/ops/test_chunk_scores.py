"""Chunks counted on a row's real tokens: their scores, the best of them, their positions."""

import math

import pytest
import torch

from cenote.ops.chunk_scores import (
    TokenOrder,
    best_chunks,
    chunk_positions,
    chunk_scores,
    common_members,
    set_overlap,
    spread,
)
from cenote.ops.sign_hashes import hamming_distance, random_orthogonal, sign_codes


def left_padding(lengths, width):
    return torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def chosen(scores, lengths, order, size, keep, first=1, last=1):
    chunks = -(-torch.tensor(lengths) // size)
    kept = best_chunks(chunk_scores(scores, size, "sum", order), torch.full_like(chunks, keep), chunks, first, last)
    return chunk_positions(kept, size, order)


def test_scores_of_a_short_last_chunk():
    scores = torch.arange(1.0, 8.0)[None, None]
    order = TokenOrder.full(1, 7)
    assert chunk_scores(scores, 3, "sum", order).tolist() == [[[6.0, 15.0, 7.0]]]
    assert chunk_scores(-scores, 3, "max", order).tolist() == [[[-1.0, -4.0, -7.0]]]


@pytest.mark.parametrize("holes", [False, True])
def test_padding_anywhere_moves_no_chunk(holes):
    torch.manual_seed(1)
    lengths, width = (23, 40, 31), 47
    real = left_padding(lengths, width)
    if holes:  # as after a prompt padded on the right
        real = torch.stack([row[torch.randperm(width)] for row in real])
    scores = torch.rand(3, 2, width)
    together = chosen(scores, lengths, TokenOrder.of(real), 4, 5).to_mask(width)
    for row, length in enumerate(lengths):
        own = scores[row : row + 1, :, real[row]]
        single = chosen(own, (length,), TokenOrder.full(1, length), 4, 5).to_mask(length)
        assert torch.equal(together[row][:, real[row]], single[0])
        assert not together[row][:, ~real[row]].any()


def test_first_and_last_chunks_are_always_kept_and_the_rest_are_the_best():
    scores = torch.tensor([0.0, 9.0, 0.0, 5.0, 7.0, 8.0, 0.0, 0.0])[None, None]
    kept = best_chunks(scores, torch.tensor([5]), torch.tensor([8]), first=1, last=2)
    assert sorted(kept.index[0, 0].tolist()) == [0, 1, 5, 6, 7]
    fewer = best_chunks(scores, torch.tensor([5]), torch.tensor([3]), first=1, last=2)
    assert sorted(fewer.index[0, 0].tolist()) == [0, 1, 2]


def test_of_equal_chunks_the_earlier_is_kept_whatever_the_batch():
    scores = torch.zeros(2, 1, 9)
    kept = best_chunks(scores, torch.tensor([3, 3]), torch.tensor([9, 5]), first=0, last=1)
    assert [sorted(row) for row in kept.index[:, 0].tolist()] == [[0, 1, 8], [0, 1, 4]]


def test_a_row_may_keep_more_than_another():
    kept = best_chunks(torch.rand(2, 3, 6), torch.tensor([6, 2]), torch.tensor([6, 6]))
    assert kept.to_mask(6).sum(dim=-1).tolist() == [[6] * 3, [2] * 3]


def test_spread_counts_the_chunks_below_the_share():
    whole = torch.tensor([10])
    mass = torch.full((1, 1, 10), 0.1, dtype=torch.float64)
    assert float(spread(mass, whole, share=0.85)) == pytest.approx(0.8)
    one = torch.tensor([0.95, *[0.05 / 9] * 9])[None, None]
    assert float(spread(one, whole)) == 0
    # Chunks that the row does not have count nowhere.
    assert float(spread(torch.cat([one, torch.zeros(1, 1, 5)], dim=-1), whole)) == 0
    even = torch.tensor([0.5, 0.5, 0, 0, 0])[None, None]
    assert float(spread(even, torch.tensor([2]))) == 0.5


def test_spread_lies_in_zero_to_below_one():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        mass = torch.rand(3, 2, 12, generator=g).pow(1 + seed)
        found = spread(mass, torch.tensor([12, 12, 12]))
        assert (found >= 0).all()
        assert (found < 1).all()


def test_overlap_of_sets():
    sets = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
    for layer, members in enumerate(((0, 1, 2), (1, 2, 3), (3, 4, 5))):
        sets[0, 0, layer, list(members)] = True
    third = 1 / 3
    expected = torch.tensor([[1, 2 * third, 0], [0, 1, third], [0, 0, 1]], dtype=torch.float64)
    common = common_members(sets)[0]
    assert common[0].tolist() == [[3, 2, 0], [2, 3, 1], [0, 1, 3]]
    torch.testing.assert_close(set_overlap(common)[0], expected)
    # Over seven steps the mean is the same number, to the bit: plans compare such numbers.
    assert torch.equal(set_overlap(7 * common), set_overlap(common))


@pytest.mark.parametrize("dim", [5, 64, 70, 128])
def test_hamming_distance_counts_signs_that_differ(dim):
    x = torch.randn(9, dim)
    projection = random_orthogonal(dim, seed=3)
    torch.testing.assert_close(projection @ projection.T, torch.eye(dim), atol=1e-5, rtol=0)
    assert torch.equal(projection, random_orthogonal(dim, seed=3))
    assert not torch.equal(projection, random_orthogonal(dim, seed=4))
    codes, signs = sign_codes(x, projection), x @ projection > 0
    assert codes.shape == (9, math.ceil(dim / 64))
    expected = (signs[:, None] != signs[None]).sum(dim=-1)
    assert torch.equal(hamming_distance(codes[:, None], codes[None]), expected)
    assert torch.equal(hamming_distance(codes, sign_codes(-x, projection)), torch.full((9,), dim))
