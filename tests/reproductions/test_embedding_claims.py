"""The claims of nv-embed and multi-layer-pooling that need no training, and the data planted for those that do."""

import pytest
import torch

from cenote.reproductions import available, multi_layer_pooling, nv_embed
from cenote.reproductions.two_views import retrieval, train_two_views

SYSTEMS = {"nv-embed": nv_embed, "multi-layer-pooling": multi_layer_pooling}


@pytest.mark.parametrize("slug", SYSTEMS)
def test_exact_claims_hold(slug):
    module = SYSTEMS[slug]
    found = module.exact_findings()
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}
    assert len({f.claim for f in found}) == len(found) >= 10
    assert module.REPRODUCTION.slug == slug
    assert slug in available()


def test_signed_rank_claims_hold():
    found = [*multi_layer_pooling.statistics_findings(), *multi_layer_pooling._rejections((0,), families=500)]
    assert {f.claim: f.values for f in found if f.verdict != "holds"} == {}


def test_filter_removes_the_planted_duplicates_and_is_needed_for_it():
    filtered, unfiltered, alike = nv_embed.planted_duplicates(seed=0)
    assert filtered == 0
    assert unfiltered > 95
    assert 0 < alike < 100


def test_needle_is_one_token_and_shared_by_both_views():
    first, second = nv_embed.needle(400, torch.Generator().manual_seed(0), tokens=8, flag=50.0)
    places = [view[..., 16].argmax(dim=1) for view in (first, second)]
    content = [view[torch.arange(400), place, :16] for view, place in zip((first, second), places, strict=True)]
    assert torch.equal(*content)
    assert (places[0] == places[1]).float().mean() < 0.25  # 1 of 8 by chance: the place tells nothing
    assert {int(place) for place in places[0]} == set(range(8))
    rest = first[torch.arange(8) != places[0][:, None]]
    assert abs(rest.mean()) < 0.02
    assert rest.std() == pytest.approx(1, abs=0.02)


def test_classes_are_written_into_the_flagged_token_alone():
    centres = 100 * torch.eye(8, 16)
    targets = torch.arange(8).repeat(50)
    x = nv_embed.classes(targets, torch.Generator().manual_seed(0), centres)
    flagged = x[torch.arange(400), x[..., 16].argmax(dim=1)]
    assert torch.equal(flagged[:, :16].argmax(dim=1), targets)
    assert (x[..., :16].amax(dim=2) > 50).sum() == 400


def test_only_the_planted_layer_is_shared_by_both_views():
    scales = multi_layer_pooling.SCALES["layers of scales 0.02 to 3"]
    assert (scales[0], scales[-1]) == (pytest.approx(0.02, rel=0.01), pytest.approx(3, rel=0.01))
    first, second = multi_layer_pooling.planted_layer(400, torch.Generator().manual_seed(0), scales)
    for layer in range(multi_layer_pooling.LAYERS):
        pair = torch.stack([view[:, layer].mean(dim=1).flatten() for view in (first, second)])
        # Signal of variance 1 beside noise of variance 1 / tokens in the planted layer; none elsewhere.
        expected = 1 / (1 + 1 / multi_layer_pooling.TOKENS) if layer == multi_layer_pooling.PLANTED else 0.0
        assert torch.corrcoef(pair)[0, 1] == pytest.approx(expected, abs=0.04)


def test_retrieval_is_one_where_views_agree_and_chance_where_they_share_nothing():
    def same(items, generator):
        view = torch.randn(items, 8, generator=generator)
        return view, view

    def unrelated(items, generator):
        return torch.randn(2, items, 8, generator=generator).unbind()

    model = torch.nn.Identity()
    assert retrieval(model, same, 0, items=64) == 1
    assert retrieval(model, unrelated, 0, items=64, galleries=50) == pytest.approx(1 / 64, abs=0.01)


def test_training_is_reproducible_and_leaves_global_randomness_alone():
    def draw(items, generator):
        view = torch.randn(items, 4, generator=generator)
        return view, view + 0.1 * torch.randn(items, 4, generator=generator)

    state = torch.get_rng_state()
    models = [train_two_views(lambda: torch.nn.Linear(4, 4), draw, seed, steps=3) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, models[2].weight)


@pytest.mark.parametrize("latent_and_mean", [((1.0, 1.0), (0.01, 0.5)), ((0.5, 1.0), (0.01, 0.01))])
def test_central_claim_fails_with_either_side(monkeypatch, latent_and_mean):
    values = iter(latent_and_mean)
    monkeypatch.setattr(nv_embed, "_found", lambda *args, **options: next(values))
    central = nv_embed._needle_of_8((0, 1))[0]
    assert central.verdict == "inconclusive"
