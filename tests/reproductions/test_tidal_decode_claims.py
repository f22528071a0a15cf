from math import log

import pytest
import torch

from attention_hosts import decoder
from cenote.attention import LayerPlan, TidalDecode
from cenote.backbones.embedded_language import load_embedded_language
from cenote.reproductions.tidal_decode import perplexity_findings
from cenote.reproductions.tidal_decode_exact import exact_findings
from cenote.reproductions.tidal_decode_worlds import (
    Subject,
    decoded,
    neighbour_overlap,
    peers,
    retrieval,
    text_losses,
    tuned,
)
from cenote.worlds.planted_facts import PlantedFacts, accuracy


@pytest.fixture(scope="module")
def subject():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(2, 64, (400,), generator=generator)
    return Subject("random", decoder(num_hidden_layers=6), text, 60, 1, (1, 3))


def test_the_exact_properties_hold_on_a_random_model():
    text = torch.randint(2, 64, (1, 160), generator=torch.Generator().manual_seed(0))
    for each in exact_findings(decoder(num_hidden_layers=6), text):
        assert each.verdict == "holds", each


def test_stretches_begin_with_the_first_token_and_differ_by_seed(subject):
    ids = subject.stretches(3, 0)
    assert ids.shape == (3, 60)
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids, subject.stretches(3, 0))
    assert not torch.equal(ids, subject.stretches(3, 1))
    windows = subject.text.unfold(0, 59, 1)
    assert all((windows == row[1:]).all(1).any() for row in ids)


def test_losses_of_dense_decoding_are_those_of_one_pass(subject):
    ids = subject.stretches(2, 0)
    said = subject.model(ids).logits.log_softmax(-1)[:, 47:-1]
    expected = -said.gather(-1, ids[:, 48:, None]).mean()
    losses = text_losses(subject.model, ids, 12, {"dense": None})
    assert losses["dense"] == pytest.approx(float(expected), rel=1e-5)


def test_peers_leave_the_same_layers_dense_and_agree_with_room_for_everything(subject):
    ids = subject.stretches(2, 0)
    recipes = peers(subject, 8, seed=0)
    plan = LayerPlan(("full", "select", 1, "select", 3, 3))
    assert recipes["TidalDecode"].plan_for(6) == plan
    assert recipes["window"].dense_layers == (0, 1, 3)
    said = decoded(subject.model, ids, 50, recipes)
    for name, logits in said.items():
        different = float((logits - said["dense"]).abs().max())
        assert (different > 1e-3) == (name != "dense"), name
    # The first sets of all are chosen in layer 1: without a second choice layer 2 is the same, layer 4 is not.
    for logits in decoded(subject.model, ids, 50, peers(subject, 60, seed=0)).values():
        torch.testing.assert_close(logits, said["dense"], rtol=1e-4, atol=1e-5)


def test_overlap_is_that_of_chance_for_a_budget_of_everything(subject):
    ids = subject.stretches(2, 0)
    assert neighbour_overlap(subject, ids, 2, 59) == pytest.approx(1, abs=0.03)
    assert 0 < neighbour_overlap(subject, ids, 2, 6) < 10


def test_retrieval_by_decoding_is_that_of_one_pass():
    model, tokenizer = load_embedded_language()
    batch = PlantedFacts(tokenizer).batch(4, 200, num_facts=3)
    assert retrieval(model, batch, {"dense": None})["dense"] == 100 * accuracy(model, batch)


def test_the_second_choice_is_where_the_loss_is_least(subject):
    first, second = tuned(subject, 1, count=2, steps=6)
    ids = subject.stretches(2, 0)
    recipes = {str(place): TidalDecode(6, 1, place) for place in (2, 3, 4)}
    losses = text_losses(subject.model, ids, 6, recipes)
    assert (first, second) == (1, int(min(losses, key=losses.get)))


def test_findings_judge_the_numbers_they_are_given():
    run = {"dense": 10, "TidalDecode": 10.4, "no second choice": 10.6, "own sets in every layer": 10.3, "window": 12}
    good = {name: log(value) for name, value in {**run, "random sets": 14}.items()}
    assert [each.verdict for each in perplexity_findings([good], "text")] == ["holds"] * 5
    bad = {**good, "TidalDecode": log(11.5)}
    assert [each.verdict for each in perplexity_findings([bad], "text")] == ["does not hold"] * 2 + ["holds"] + [
        "does not hold"
    ] * 2
