"""The exact claims of HaloNet's reproduction hold, and its task and its networks are what it says."""

import pytest
import torch

from cenote.reproductions.fitting import Labelled
from cenote.reproductions.halonet import dots_findings, scaling
from cenote.reproductions.halonet_exact import exact_findings
from cenote.reproductions.halonet_worlds import (
    conv_classifier,
    count,
    dots_network,
    fit,
    halo_classifier,
    per_cent_right,
    two_dots,
)


def test_exact_claims_hold():
    found = exact_findings()
    assert len(found) == 11
    assert [(each.claim, each.values) for each in found if each.verdict != "holds"] == []


def test_two_dots():
    (images, targets), across = two_dots(4000, 0)
    assert bool((images.flatten(1).sum(dim=1) == 2).all())
    rows, columns = images[:, 0].nonzero()[:, 1:].view(-1, 2, 2).unbind(dim=2)
    distance = (rows[:, 0] - rows[:, 1]).abs() + (columns[:, 0] - columns[:, 1]).abs()
    assert torch.equal(distance == 1, targets == 1)
    assert int(distance.max()) == 4
    blocks = (rows[:, 0] // 4 - rows[:, 1] // 4).abs() + (columns[:, 0] // 4 - columns[:, 1] // 4).abs()
    assert torch.equal(blocks, across.long())
    assert across.double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert targets[across].double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 2, 1), (7, 2, 2)])
def test_both_networks_have_about_the_same_parameters(block, halo, stride):
    wanted = count(halo_classifier(block, halo, stride))
    assert count(conv_classifier(wanted, stride)) == pytest.approx(wanted, rel=0.04)


def test_training_learns_which_images_are_bright():
    targets = torch.randint(2, (640,))
    images = torch.randn(640, 1, 12, 12) + targets[:, None, None, None]
    train, test = Labelled(images[:512], targets[:512]), Labelled(images[512:], targets[512:])
    model = fit(dots_network(2), train, steps=40, batch=32, lr=1e-2)
    assert not model.training
    assert per_cent_right(model, test) > 95


def test_a_seed_without_a_trained_comparison_shows_nothing():
    two = {"all pairs": [95.0, 95.0, 80.5], "pairs across a border": [96.0] * 3, "pairs in one block": [94.0] * 3}
    none = {"all pairs": [75.0, 50.0, 80.0], "pairs across a border": [60.0] * 3, "pairs in one block": [90, 50.0, 97]}
    whole, across, inside, trained = dots_findings(two, none, "")
    assert (whole.values, whole.passed) == ((20.0, 45.0, 0.5), (True, False, False))
    assert across.passed == (True, False, True)
    assert (inside.values, inside.passed) == ((4.0, 44.0, -3.0), (True, True, False))
    assert trained.passed == (True, False, True)


def test_scaling_is_reported_with_its_times():
    exponent, against_dense = scaling(sides=(8, 16, 24), rounds=1)
    assert "ms at 24" in exponent.note
    assert against_dense.measured > 0
