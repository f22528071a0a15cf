"""Adaptive grids, derived levels, windows and grid resampling against torch's own primitives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate

from cenote.ops.grid import resample_tokens
from cenote.ops.pyramid import adaptive_max_pool, level_sources, pyramid_pool_windows, spatial_pyramid_pool
from cenote.ops.windows import window_max_pool

side = st.integers(1, 40)


def direct(maps, levels):
    """The slow form: one adaptive max pooling a level, concatenated."""
    return torch.cat([adaptive_max_pool2d(maps, n).flatten(1) for n in levels], dim=1)


def some_windows(height, width, count, generator):
    x, y = (
        torch.stack([torch.randperm(s + 1, generator=generator)[:2].sort().values for _ in range(count)])
        for s in (width, height)
    )
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


@settings(deadline=None, max_examples=60)
@given(height=side, width=side, n=st.integers(1, 12))
def test_one_level_is_adaptive_max_pooling(height, width, n):
    maps = torch.randn(2, 3, height, width)
    assert torch.equal(adaptive_max_pool(maps, n), adaptive_max_pool2d(maps, n))


@settings(deadline=None, max_examples=60)
@given(height=side, width=side, levels=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_derived_levels_equal_direct_ones(height, width, levels):
    maps = torch.randn(2, 3, height, width)
    assert torch.equal(spatial_pyramid_pool(maps, levels), direct(maps, levels))


def test_bins_of_divisors_coincide_for_every_size():
    for length in range(1, 41):
        line = torch.randn(1, 2, length, 3)
        assert torch.equal(spatial_pyramid_pool(line, (12, 6, 4, 3, 2, 1)), direct(line, (12, 6, 4, 3, 2, 1)))


def test_the_finest_multiple_is_the_source():
    assert level_sources((6, 3, 2, 1)) == {6: None, 3: 6, 2: 6, 1: 2}
    assert level_sources((4, 3, 2, 1)) == {4: None, 3: None, 2: 4, 1: 2}


@settings(deadline=None, max_examples=40)
@given(height=side, width=side, n=st.integers(1, 8), seed=st.integers(0, 99))
def test_windows_equal_crops(height, width, n, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, height, width, generator=generator)
    windows = some_windows(height, width, 5, generator)
    which = torch.randint(2, (5,), generator=generator)
    pooled = window_max_pool(maps, windows, n, which)
    for r, (x0, y0, x1, y1) in enumerate(windows.tolist()):
        assert torch.equal(pooled[r], adaptive_max_pool2d(maps[which[r], :, y0:y1, x0:x1], n))


def test_order_and_batching_of_windows_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 8, 30, 40, generator=generator)
    windows = some_windows(30, 40, 300, generator)
    which = torch.zeros(300, dtype=torch.long)
    pooled = pyramid_pool_windows(maps, windows, which, (6, 3, 2, 1))
    order = torch.randperm(300, generator=generator)
    assert torch.equal(pyramid_pool_windows(maps, windows[order], which, (6, 3, 2, 1)), pooled[order])
    assert torch.equal(pyramid_pool_windows(maps, windows[:7], which[:7], (6, 3, 2, 1)), pooled[:7])
    assert pyramid_pool_windows(maps, windows[:0], which[:0], (6, 3, 2, 1)).shape == (0, pooled.shape[1])


def test_windows_equal_roi_pool():
    roi_pool = pytest.importorskip("torchvision.ops").roi_pool
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 4, 23, 31, generator=generator)
    windows = some_windows(23, 31, 200, generator)
    which = torch.randint(2, (200,), generator=generator)
    inclusive = torch.cat([which.unsqueeze(1), windows[:, :2], windows[:, 2:] - 1], dim=1).float()
    levels = (6, 4, 3, 2, 1)
    peer = torch.cat([roi_pool(maps, inclusive, n).flatten(1) for n in levels], dim=1)
    assert torch.equal(pyramid_pool_windows(maps, windows, which, levels), peer)


def test_gradients_without_ties():
    maps = torch.randperm(2 * 5 * 6).double().reshape(2, 1, 5, 6).div(10).requires_grad_()
    sizes = torch.tensor([[5, 6], [4, 3]])
    mask = torch.rand(2, 5, 6) < 0.7
    assert torch.autograd.gradcheck(lambda m: spatial_pyramid_pool(m, (4, 3, 2, 1)), maps, fast_mode=True)
    assert torch.autograd.gradcheck(lambda m: spatial_pyramid_pool(m, (4, 3, 2, 1), sizes), maps, fast_mode=True)
    assert torch.autograd.gradcheck(lambda m: spatial_pyramid_pool(m, (3, 2), mask=mask), maps, fast_mode=True)


def test_the_gradient_of_a_bin_goes_to_its_maximum():
    maps = torch.randperm(35).float().reshape(1, 1, 5, 7).requires_grad_()
    for windows in (False, True):
        if windows:
            pooled = pyramid_pool_windows(maps, torch.tensor([[0, 0, 7, 5]]), torch.tensor([0]), (4, 2, 1))
        else:
            pooled = spatial_pyramid_pool(maps, (4, 2, 1))
        (ours,) = torch.autograd.grad(pooled.sum(), maps)
        (peer,) = torch.autograd.grad(direct(maps, (4, 2, 1)).sum(), maps)
        assert torch.equal(ours, peer)


@pytest.mark.parametrize(
    ("windows", "index", "message"),
    [
        ([[0, 0, 0, 2]], [0], "non-empty"),
        ([[0, 0, 6, 2]], [0], "inside maps"),
        ([[-1, 0, 2, 2]], [0], "inside maps"),
        ([[0, 0, 2, 2]], [1], "batch_index must lie in 0..0"),
    ],
)
def test_bad_windows_are_refused(windows, index, message):
    with pytest.raises(ValueError, match=message):
        window_max_pool(torch.randn(1, 2, 4, 5), torch.tensor(windows), 2, torch.tensor(index))


@pytest.mark.parametrize("levels", [(), (0,), (2, -1), (2.0,), (True,)])
def test_bad_levels_are_refused(levels):
    # The run-time check of annotations may speak first, with a TypeError.
    with pytest.raises((ValueError, TypeError), match="levels"):
        spatial_pyramid_pool(torch.randn(1, 2, 4, 5), levels)


def as_tokens(maps):
    return maps.flatten(2).transpose(1, 2)


@settings(deadline=None, max_examples=30)
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_resampling_is_torch_on_the_map(grid, size):
    maps = torch.randn(2, 3, *grid)
    for mode, peer in (
        ("bilinear", interpolate(maps, size, mode="bilinear", align_corners=False)),
        ("average", adaptive_avg_pool2d(maps, size)),
    ):
        resampled, none = resample_tokens(as_tokens(maps), grid, size, mode)
        assert none is None
        torch.testing.assert_close(resampled, as_tokens(peer))
        masked, mask = resample_tokens(
            as_tokens(maps), grid, size, mode, torch.ones(2, grid[0] * grid[1], dtype=torch.bool)
        )
        assert bool(mask.all())
        torch.testing.assert_close(masked, as_tokens(peer))


@pytest.mark.parametrize("mode", ["bilinear", "average"])
def test_resampling_never_reads_padding(mode):
    maps = torch.randn(2, 3, 6, 8)
    mask = torch.zeros(2, 6, 8, dtype=torch.bool)
    mask[0, :5, :3] = mask[1, 2:, 4:] = True
    clean, kept = resample_tokens(as_tokens(maps), (6, 8), (3, 4), mode, mask.flatten(1))
    dirty = maps.masked_fill(~mask.unsqueeze(1), float("nan"))
    again, _ = resample_tokens(as_tokens(dirty), (6, 8), (3, 4), mode, mask.flatten(1))
    assert torch.equal(clean, again)
    assert bool((again[~kept] == 0).all())
    ones, _ = resample_tokens(torch.ones(2, 48, 1), (6, 8), (3, 4), mode, mask.flatten(1))
    torch.testing.assert_close(ones.squeeze(-1), kept.float())


def test_resampling_refuses_what_is_no_grid():
    with pytest.raises(ValueError, match="cannot resample 7 tokens"):
        resample_tokens(torch.randn(1, 7, 2), (2, 3), (4, 4))
    with pytest.raises((ValueError, TypeError), match="mode"):
        resample_tokens(torch.randn(1, 6, 2), (2, 3), (4, 4), "cubic")
