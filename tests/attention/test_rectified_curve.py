"""The space-filling curve and the blocks it cuts a grid into."""

from itertools import permutations, product

import pytest
import torch

from cenote.ops.space_filling_curve import block_neighbours, hilbert_order, inverse_order
from reference.space_filling_curve import curve_cells


def steps(shape, axis_order):
    order = hilbert_order(shape, axis_order)
    places = torch.stack(torch.unravel_index(order, shape), dim=1)
    return places.diff(dim=0).abs().sum(1)


@pytest.mark.parametrize("shape", [*product((1, 2, 3, 5, 8), repeat=3), (9, 16, 30)])
def test_every_cell_is_visited_once(shape):
    for axis_order in permutations("wht"):
        order = hilbert_order(shape, axis_order)
        assert torch.equal(order.sort().values, torch.arange(order.numel()))
        assert torch.equal(order[inverse_order(order)], torch.arange(order.numel()))


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6, 8), (10, 2, 14), (8, 8, 8), (2, 2, 2), (1, 6, 8), (4, 1, 6)])
def test_even_extents_need_single_steps_only(shape):
    for axis_order in permutations("wht"):
        assert (steps(shape, axis_order) == 1).all()


def test_odd_extents_cost_a_few_diagonal_steps():
    found = steps((5, 6, 7), ("h", "w", "t"))
    assert len(found) == 209
    assert (found > 1).sum() == 4
    assert (steps((7, 6, 5), ("w", "h", "t")) > 1).float().mean() < 0.05


def test_flat_axes_do_not_lead():
    assert (steps((6, 8, 1), ("w", "h", "t")) == 1).all()
    assert hilbert_order((1, 1, 5)).tolist() == [0, 1, 2, 3, 4]
    assert hilbert_order((1, 1, 1)).tolist() == [0]


def test_what_a_caller_does_to_an_order_stays_with_the_caller():
    first = hilbert_order((2, 4, 4))
    expected = first.clone()
    first.zero_()
    assert torch.equal(hilbert_order((2, 4, 4)), expected)


@pytest.mark.parametrize(("shape", "block_size"), [((3, 4, 5), 7), ((2, 2, 2), 3), ((1, 6, 6), 4)])
def test_neighbours_touch(shape, block_size):
    order = hilbert_order(shape)
    owner = inverse_order(order) // block_size
    places = torch.stack(torch.unravel_index(torch.arange(order.numel()), shape), dim=1)
    close = (places[:, None] - places[None]).abs().amax(-1) <= 1
    blocks = int(owner.max()) + 1
    expected = torch.zeros(blocks, blocks, dtype=torch.bool)
    for a, b in close.nonzero().tolist():
        expected[owner[a], owner[b]] = True
    assert torch.equal(block_neighbours(order, shape, block_size), expected)


def test_bad_input():
    with pytest.raises(ValueError, match="three extents"):
        hilbert_order((2, 0, 3))
    with pytest.raises(ValueError, match="three extents"):
        hilbert_order((2, 3))
    with pytest.raises(ValueError, match="axis_order"):
        hilbert_order((2, 2, 2), ("w", "w", "t"))
    with pytest.raises(ValueError, match=r"2 x 2 x 2 = 8 cells, got 7"):
        block_neighbours(torch.arange(7), (2, 2, 2), 2)
    with pytest.raises(ValueError, match="block_size"):
        block_neighbours(torch.arange(8), (2, 2, 2), 0)


@pytest.mark.parametrize("axes", list(permutations("wht")))
@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 6, 7), (3, 9, 11), (5, 2, 2), (2, 2, 9), (4, 6, 8)])
def test_every_axis_order_is_the_walk_written_with_vectors(shape, axes):
    assert hilbert_order(shape, axes).tolist() == curve_cells(shape, axes)
