"""EchoAtt's exact claims hold, and its worlds and measures are what they say."""

from pathlib import Path

import pytest
import torch

from cenote.reproductions import available, echo_att
from cenote.reproductions.echo_att_exact import exact_findings
from cenote.reproductions.echo_att_worlds import Subject, damage, embedded, measure, random_sets
from cenote.reproductions.run import load_reproduction


@pytest.fixture(scope="module")
def subject():
    return embedded(0, None, length=64, items=2)


def test_it_is_offered():
    assert "echo-att" in available()
    assert load_reproduction("echo-att").claim == echo_att.CLAIM


def test_exact_claims_hold():
    found = exact_findings()
    assert {each.claim: each.values for each in found if each.verdict != "holds"} == {}
    assert len(found) == 12


def test_texts_differ_by_seed_and_use(subject):
    assert not torch.equal(subject.judged, embedded(1, Path("/nowhere"), length=64, items=2).judged)
    assert not torch.equal(subject.judged, subject.read)
    assert subject.train is None


def test_damage_is_the_rise_of_the_loss(subject):
    dense = measure(subject.model, subject.judged)
    assert damage(subject, (), dense.loss) == 0.0
    assert damage(subject, (1, 2, 3, 4, 5, 6, 7), dense.loss) > 0.1
    assert dense.loss == pytest.approx(subject.model(subject.judged, labels=subject.judged).loss.item(), abs=1e-4)


def test_random_sets_are_different_and_never_the_first_layer():
    sets = random_sets(8, 4, 6, 0)
    assert len(set(sets)) == 6
    assert all(0 not in each and len(set(each)) == 4 for each in sets)
    assert random_sets(8, 6, 35, 0) == random_sets(8, 6, 35, 1)


def test_students_of_one_teacher_are_trained_and_compared(subject):
    taught = Subject(subject.model, subject.judged, subject.read, subject.judged.repeat(2, 1))
    before = {name: value.clone() for name, value in taught.model.state_dict().items()}
    outcome = echo_att.train_students(taught, 0, 5)
    assert outcome.shared.loss > outcome.dense.loss
    assert outcome.recovered(outcome.shared) == 0
    assert outcome.recovered(outcome.dense) == 100
    assert outcome.continued.loss < outcome.shared.loss  # what is judged was learnt here
    assert all(torch.equal(value, before[name]) for name, value in taught.model.state_dict().items())
