"""The claims of COSTARR that need no data, and that the worlds for the others are what they say."""

import pytest
import torch

from cenote.reproductions import available, costarr
from cenote.reproductions.costarr_exact import exact_findings
from cenote.reproductions.costarr_worlds import (
    digits_world,
    hold_out,
    measure,
    planted_attenuation,
    train_classifier,
)


def test_it_is_offered():
    assert "costarr" in available()
    assert costarr.REPRODUCTION.slug == "costarr"


def test_exact_claims_hold():
    found = exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) == 11


def test_attenuation_claims_hold():
    found = costarr.attenuation_findings((0, 1))
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}


def test_planted_unknowns_differ_only_where_weights_are_near_zero():
    world, model = planted_attenuation(3, items=4000)
    known, unknown = (world.test[world.test_labels >= 0], world.test[world.test_labels < 0])
    away = (known.mean(dim=0) - unknown.mean(dim=0)).abs()
    assert away[:12].max() < 0.06  # rounding of 4000 draws; levels are 1.5 apart
    assert away[12:].min() > 1.4
    assert model.head.weight[:, 12:].abs().max() <= 1e-3
    assert (model.head(world.train).argmax(dim=1) == world.train_labels).double().mean() > 0.99


def test_held_out_digits_are_unknown_and_never_trained_on():
    world, again, other = digits_world(0), digits_world(0), digits_world(1)
    assert torch.equal(world.train, again.train)
    assert not torch.equal(world.train_labels[:50], other.train_labels[:50])
    assert world.train_labels.unique().tolist() == list(range(6))
    assert world.test_labels.unique().tolist() == [-1, *range(6)]
    assert len(world.test) == 597
    assert 0.3 < float((world.test_labels < 0).double().mean()) < 0.5
    assert world.train.max() == 1


def test_classes_are_numbered_anew_alike_in_both_parts():
    labels = torch.arange(10).repeat(3)
    x = labels[:, None].float()
    world = hold_out(x, labels, x, labels, seed=4)
    for k in range(6):
        old = world.train[world.train_labels == k].unique()
        assert len(old) == 1
        assert torch.equal(world.test[world.test_labels == k].unique(), old)
    assert len(world.train) == 18


def test_a_short_training_learns_and_every_method_beats_chance():
    world = digits_world(0)
    model = train_classifier(world, 0, epochs=12)
    found = measure(world, model)
    accuracy = (model.head(model.test).argmax(dim=1) == world.test_labels)[world.test_labels >= 0].double().mean()
    assert accuracy > 0.9
    for name, (auroc, auoscr) in found.items():
        assert auroc > 60, name
        assert auoscr <= 100 * accuracy, name


def test_findings_count_seeds_and_say_what_was_reconstructed():
    world = digits_world(0)
    run = measure(world, train_classifier(world, 0, epochs=3))
    better = {**run, "MaxLogit": run["COSTARR"]._replace(auoscr=run["COSTARR"].auoscr - 2)}
    worse = {**run, "MaxLogit": run["COSTARR"]._replace(auoscr=run["COSTARR"].auoscr + 1)}
    gain, seeds, *_ = costarr.gain_findings([better] * 8 + [worse] * 2, "digits", central=True)
    assert gain.measured == pytest.approx(1.4)
    assert seeds.measured == pytest.approx(80)
    assert (gain.verdict, seeds.verdict) == ("holds", "holds")
    assert "reconstructed" in gain.note
    gain, seeds, *_ = costarr.gain_findings([better] * 7 + [worse] * 3, "digits")
    assert seeds.verdict == "does not hold"
