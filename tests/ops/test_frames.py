"""Frame masks, dropped frames, and statistics over what is left."""

from itertools import pairwise

import pytest
import torch

from cenote.ops.frames import kept_frames, length_mask, span_out
from cenote.ops.statistics import masked_statistics, raw_moments, weighted_statistics


def test_mask_of_lengths():
    mask = length_mask(torch.tensor([3, 1, 5]), 5)
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] + [False] * 4, [True] * 5]
    for lengths in ([0, 3], [3, 6], [3, 48000]):
        with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.5 \(frames, not samples\)"):
            length_mask(torch.tensor(lengths), 5)


def test_kept_frames_are_real_and_never_none():
    torch.manual_seed(0)
    mask = torch.arange(20) < torch.randint(1, 21, (500, 1))
    kept = kept_frames(mask, 0.3)
    assert not bool((kept & ~mask).any())
    assert bool(kept.any(dim=1).all())
    long = mask.sum(dim=1) > 10
    assert (kept[long].sum() / mask[long].sum()).item() == pytest.approx(0.7, abs=0.02)


def test_span_out_drops_spans_and_closes_the_gaps():
    count, frames = 400, 50
    hidden = torch.arange(float(frames)).expand(count, 2, 3, frames).mT.clone()  # a frame's content is its number
    mask = torch.ones(count, frames, dtype=torch.bool)
    mask[:, 45:] = False
    out, kept = span_out(hidden, mask, probability=0.5, generator=torch.Generator().manual_seed(0))
    changed = kept.sum(dim=1) < 45
    assert changed.float().mean().item() == pytest.approx(0.5 * (1 - 0.95**47), abs=0.08)
    lost = 1 - kept[changed].sum(dim=1) / 45
    assert lost.mean().item() == pytest.approx(1 - 0.95**3, abs=0.03)  # a frame stays if none of three starts hit it
    for row, real in zip(out[:50, 0, :, 0], kept[:50], strict=True):
        n = int(real.sum())
        assert bool(real[:n].all())  # the gap is closed
        left = [int(v) for v in row[:n]]
        assert left == sorted(set(left))  # in the old order
        assert max(left) < 45
        gaps = [b - a - 1 for a, b in pairwise(left)]
        assert all(gap == 0 or gap >= 3 for gap in gaps)
    torch.testing.assert_close(out[:, 1, :, 2], out[:, 0, :, 0])  # all layers and channels alike


def test_span_out_at_its_limits():
    hidden = torch.randn(4, 2, 6, 3)
    same, mask = span_out(hidden, probability=0.0)
    assert torch.equal(same, hidden)
    assert bool(mask.all())
    same, mask = span_out(hidden, probability=1.0, start=1.0)  # would lose everything
    assert torch.equal(same, hidden)
    assert bool(mask.all())
    for bad in ({"probability": 1.5}, {"start": -0.1}, {"length": 0}):
        with pytest.raises(ValueError, match="expected chances"):
            span_out(hidden, **bad)


@pytest.mark.parametrize("correction", [0, 1])
def test_deviation_with_and_without_correction(correction):
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)) + 50
    lengths = (8, 5, 1)
    mask = length_mask(torch.tensor(lengths), 8)
    padded = torch.where(mask[..., None], x, float("nan")).requires_grad_()
    mean, deviation = masked_statistics(padded, mask, floor=1e-10, correction=correction)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(mean[row], x[row, :n].mean(dim=0))
        expected = x[row, :n].std(dim=0, correction=correction) if n > 1 else torch.full((4,), 1e-5)
        torch.testing.assert_close(deviation[row], expected, rtol=1e-4, atol=1e-5)
    deviation.sum().backward()
    assert bool(padded.grad.isfinite().all())
    plain = masked_statistics(x, correction=correction)
    torch.testing.assert_close(plain, masked_statistics(x, torch.ones_like(mask), correction=correction))
    torch.testing.assert_close(plain[1], x.std(dim=1, correction=correction), rtol=1e-4, atol=1e-5)


def test_raw_moments_are_the_deviation_where_weights_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(3, 8, 4, generator=generator), torch.rand(3, 8, 4, generator=generator).softmax(dim=1)
    mean, deviation = raw_moments(x, weights, 1e-4)
    torch.testing.assert_close(mean, (weights * x).sum(dim=1))
    torch.testing.assert_close(deviation, (weights * (x - mean[:, None]).square()).sum(dim=1).sqrt())
    halved, _ = raw_moments(x, weights / 2, 1e-4)
    torch.testing.assert_close(halved, mean / 2)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("channels", [1, 4])
def test_gradients_of_statistics_are_those_of_finite_differences(with_mask, channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    scores = torch.randn(3, 6, channels, dtype=torch.float64, generator=generator, requires_grad=True)
    mask = length_mask(torch.tensor([6, 3, 1]), 6) if with_mask else None

    def attentive(x, scores):
        real = scores if mask is None else scores.masked_fill(~mask[..., None], float("-inf"))
        return weighted_statistics(x, real.softmax(dim=1), mask, 1e-3)

    assert torch.autograd.gradcheck(attentive, (x, scores))
    assert torch.autograd.gradcheck(lambda x: masked_statistics(x, mask, 1e-3, correction=int(channels == 4)), (x,))
