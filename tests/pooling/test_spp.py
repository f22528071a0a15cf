"""SPP on maps, ragged maps and token grids."""

import itertools

import pytest
import torch
from torch.nn.functional import adaptive_max_pool2d

from cenote.pooling.spp import SPP, training_sizes

LEVELS = (6, 3, 2, 1)


def direct(maps, levels=LEVELS):
    return torch.cat([adaptive_max_pool2d(maps, n).flatten(1) for n in levels], dim=1)


def as_tokens(maps):
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("size", [(13, 13), (10, 10), (7, 11), (1, 1), (3, 40), (24, 36)])
def test_equals_concatenated_adaptive_pooling_at_one_length(size):
    maps = torch.randn(2, 5, *size)
    pool = SPP(5, LEVELS)
    assert torch.equal(pool.pool_maps(maps), direct(maps))
    assert pool.pool_maps(maps).shape == (2, pool.out_dim) == (2, 5 * 50)
    assert torch.equal(SPP(5, LEVELS, grid=size)(as_tokens(maps)), direct(maps))


def test_official_maxima_start_at_zero():
    maps = -torch.rand(1, 4, 6, 6)
    assert torch.equal(SPP.from_reference(dim=4, levels=[2, 1]).pool_maps(maps), torch.zeros(1, 20))
    assert torch.equal(SPP(4, [2, 1]).pool_maps(maps), direct(maps, (2, 1)))


def test_flipping_the_map_flips_the_bins():
    maps, pool = torch.randn(2, 3, 11, 14), SPP(3, (4,))
    straight, flipped = (pool.pool_maps(m).unflatten(1, (3, 4, 4)) for m in (maps, maps.flip(-1)))
    assert torch.equal(flipped, straight.flip(-1))


def test_a_constant_is_carried_through():
    # Steps of 1/8 and a whole constant: the addition is exact in float32.
    maps, pool = torch.randint(-99, 99, (2, 3, 9, 9)) / 8, SPP(3, LEVELS)
    assert torch.equal(pool.pool_maps(maps + 7), pool.pool_maps(maps) + 7)


def test_level_one_is_the_global_maximum():
    maps = torch.randn(2, 3, 9, 5)
    assert torch.equal(SPP(3, (1,)).pool_maps(maps), maps.amax((2, 3)))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_ragged_maps_pool_as_if_alone(garbage):
    sizes = [(13, 13), (7, 11), (1, 5), (10, 2)]
    maps = [torch.randn(3, *size) for size in sizes]
    padded = torch.full((4, 3, 15, 16), garbage)
    for b, item in enumerate(maps):
        padded[b, :, : item.shape[1], : item.shape[2]] = item
    alone = torch.cat([direct(item.unsqueeze(0)) for item in maps])
    pool = SPP(3, LEVELS)
    assert torch.equal(pool.pool_maps(maps), alone)
    assert torch.equal(pool.pool_maps(padded, torch.tensor(sizes)), alone)


def test_a_token_grid_padded_on_any_side_pools_as_if_alone():
    real = torch.randn(2, 3, 5, 4)
    alone = SPP(3, LEVELS, grid=(5, 4))(as_tokens(real))
    for top, left in itertools.product((0, 1, 3), (0, 2)):
        padded, mask = torch.full((2, 3, 8, 7), float("nan")), torch.zeros(2, 8, 7, dtype=torch.bool)
        padded[:, :, top : top + 5, left : left + 4] = real
        mask[:, top : top + 5, left : left + 4] = True
        assert torch.equal(SPP(3, LEVELS, grid=(8, 7))(as_tokens(padded), mask.flatten(1)), alone)


def test_missing_cells_never_win_and_empty_bins_are_zero():
    maps = -torch.rand(1, 1, 4, 4) - 1
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, :2, :2] = False  # the first bin of level 2
    mask[0, 3, 0] = False
    maps[0, 0, 3, 0] = 100.0
    pooled = SPP(1, (2, 1), grid=(4, 4))(as_tokens(maps), mask.flatten(1))[0]
    real = maps.masked_fill(~mask.unsqueeze(1), float("-inf"))
    assert pooled[0] == 0
    assert torch.equal(pooled[1:], direct(real, (2, 1))[0, 1:])


def test_squares_of_different_sizes_without_a_grid():
    maps = [torch.randn(1, 3, side, side) for side in (5, 2)]
    tokens, mask = torch.full((2, 26, 3), 1e9), torch.zeros(2, 26, dtype=torch.bool)
    for b, item in enumerate(maps):
        count = item[0, 0].numel()
        tokens[b, 1 : 1 + count], mask[b, 1 : 1 + count] = as_tokens(item)[0], True
    assert torch.equal(SPP(3, LEVELS)(tokens, mask), torch.cat([direct(item) for item in maps]))


def test_a_full_mask_changes_nothing():
    tokens = torch.randn(2, 30, 3)
    pool = SPP(3, LEVELS, grid=(5, 6))
    assert torch.equal(pool(tokens, torch.ones(2, 30, dtype=torch.bool)), pool(tokens))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="must be a square"):
        SPP(3)(torch.randn(1, 8, 3))
    with pytest.raises(ValueError, match="3 x 4 needs 12 tokens, got 9"):
        SPP(3, grid=(3, 4))(torch.randn(1, 9, 3))
    with pytest.raises(ValueError, match="levels must be"):
        SPP(3, ())
    with pytest.raises(ValueError, match="grid must be"):
        SPP(3, grid=(0, 4))
    pool = SPP(3)
    with pytest.raises(ValueError, match="dim=3, got maps of \\[4\\] channels"):
        pool.pool_maps(torch.randn(1, 4, 5, 5))
    with pytest.raises(ValueError, match="at least one row"):
        pool.pool_maps(torch.randn(1, 3, 0, 5))
    with pytest.raises(ValueError, match="non-empty and inside"):
        pool.pool_maps(torch.randn(1, 3, 4, 5), torch.tensor([[5, 5]]))
    with pytest.raises(ValueError, match="list of maps"):
        pool.pool_maps([torch.randn(3, 4, 5)], torch.tensor([[4, 5]]))
    with pytest.raises(TypeError):
        pool.pool_maps(torch.ones(1, 3, 4, 5, dtype=torch.int64))


def test_training_sizes():
    assert list(training_sizes(5)) == [224, 180, 224, 180, 224]
    drawn = list(training_sizes(200, uniform=True, seed=1))
    assert (min(drawn), max(drawn)) == (180, 224)
    assert drawn == list(training_sizes(200, uniform=True, seed=1))
    assert drawn != list(training_sizes(200, uniform=True, seed=2))
    with pytest.raises(ValueError, match="sizes must be"):
        list(training_sizes(3, ()))
