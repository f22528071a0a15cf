"""The phenomenological loss, its descent and its fit, and the minimal induction head."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cenote.worlds.context_classification import ContextClassification
from cenote.worlds.induction_theory import (
    MinimalInductionHead,
    descend,
    fit_phenomenological,
    phenomenological_loss,
)


def by_autograd(b, a, xi, pairs, labels):
    b, a, xi = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (b, a, xi))
    w = b.exp() / (b.exp() + pairs)
    z = (a * w).exp() + 2 * pairs
    plus, other = (a * w).exp() / z, 1 / z
    right = (xi * plus).exp()
    loss = -(right / (right + (pairs - 1) * (xi * other).exp() + labels - pairs)).log()
    return loss.item(), *(g.item() for g in torch.autograd.grad(loss, (b, a, xi)))


@pytest.mark.parametrize(
    "point", [(0.0, 0.0, 0.0), (0.5, 1.0, 2.0), (-1.0, 3.0, 8.0), (4.0, 6.0, 5.0), (2.0, -1.0, -3.0)]
)
@pytest.mark.parametrize("sizes", [(8, 32), (4, 4), (1, 5)])
def test_loss_and_its_gradient(point, sizes):
    assert phenomenological_loss(*point, *sizes) == pytest.approx(by_autograd(*point, *sizes), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("pairs", "labels"), [(8, 32), (8, 9), (4, 16), (8, 8)])
def test_origin(pairs, labels):
    at = phenomenological_loss(0, 0, 0, pairs, labels)
    assert at.loss == pytest.approx(math.log(labels))
    assert at.dxi == pytest.approx(-(labels - pairs) / (labels * (2 * pairs + 1)), abs=1e-15)
    assert at.da == at.db == 0


def test_far_from_the_origin_nothing_overflows():
    at = phenomenological_loss(800.0, 900.0, 700.0, 8, 32)
    assert at.loss == pytest.approx(0, abs=1e-9)
    assert all(math.isfinite(v) for v in at)


@pytest.mark.parametrize(
    ("labels", "times"), [(32, (18, 98.5, 99.5, 106.5)), (16, (32.5, 120, 122, 129.5)), (9, (195.5, 227, 240.5, 250))]
)
def test_times_of_the_descent(labels, times):
    way = descend(8, labels)
    levels = (0.99 * math.log(labels), 1.02 * math.log(8), math.log(8) / 2, 0.1)
    assert [way.first_below(level) for level in levels] == pytest.approx(times, rel=0.02)
    # The plateau first: trust grows while both attentions stay where they are.
    plateau = way.states[np.searchsorted(way.times, 0.5 * times[1])]
    assert plateau[2] > 3 * max(abs(plateau[0]), abs(plateau[1]))


def test_equal_labels_and_pairs_never_leave():
    assert np.abs(descend(8, 8).states).max() == 0
    assert descend(8, 8, 10).first_below(1.0) == math.inf


@pytest.mark.parametrize("fit_start", [False, True])
def test_fit_finds_its_own_curve(fit_start):
    way = descend(4, 16, 100.0, 0.5, (0.4, 0.3, 0.5) if fit_start else (0, 0, 0))
    steps = 50 * way.times[::6]
    fit = fit_phenomenological(steps, way.losses[::6], 4, 16, fit_start=fit_start, step=1.0 if fit_start else 0.5)
    assert fit.misfit < (0.05 if fit_start else 0.01)
    assert fit.explained > 0.99
    assert fit.worst >= fit.misfit
    if not fit_start:
        assert fit.steps_per_time == pytest.approx(50, rel=0.01)
        assert fit.start == (0, 0, 0)


def test_a_curve_of_another_kind_is_misfitted_and_said_so():
    steps = np.arange(0, 5000, 250)
    fit = fit_phenomenological(steps, math.log(16) * np.exp(-steps / 2000), 4, 16, fit_start=False)
    assert fit.misfit > 0.2
    assert fit.explained < 0.95


def test_the_minimal_head_solves_the_task_at_large_numbers_and_learns():
    world = ContextClassification(num_classes=64, num_labels=16, pairs=4, dim=31, max_pairs=8).in_context()
    head = MinimalInductionHead(world)
    batch = world.sample(500, 0)
    assert F.cross_entropy(head(batch.inputs), batch.targets).item() == pytest.approx(math.log(16))
    with torch.no_grad():
        for number, value in ((head.previous, 30.0), (head.match, 60.0), (head.label, 30.0)):
            number.fill_(value)
        head.readout.weight.copy_(20 * world.label_vectors)
    assert (head(batch.inputs).argmax(dim=1) == batch.targets).float().mean() > 0.99
    assert not MinimalInductionHead(world, train_label_bias=False).label.requires_grad


def test_bad_input():
    for pairs, labels in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match="pairs"):
            phenomenological_loss(0, 0, 0, pairs, labels)
    with pytest.raises(ValueError, match="step > 0"):
        descend(4, 8, step=0)
    with pytest.raises(ValueError, match="five losses"):
        fit_phenomenological([0, 1], [1.0, 0.5], 4, 8)
