"""Redistribution of attention: what must stay, what must move, what must be refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenote.ops.attention_sinks import redistribute_attention, sink_scores


def case(seed=0, batch=2, heads=3, queries=5, keys=12):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, heads, queries, keys, generator=generator).mul(2).softmax(-1)
    image = torch.zeros(batch, keys, dtype=torch.bool)
    image[0, 2:8], image[1, 1:5] = True, True
    sinks = torch.zeros_like(image)
    sinks[0, [0, 3]], sinks[1, [0, 2]] = True, True
    rows = torch.ones(batch, queries, dtype=torch.bool)
    rows[1, 0] = False
    return weights, sinks, image, rows


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_only_selected_rows_change_and_keep_their_sum(seed, moved, rho):
    weights, sinks, image, rows = case(seed)
    after = redistribute_attention(weights, sinks, image, rows, moved=moved, rho=rho)
    torch.testing.assert_close(after.weights.sum(-1), torch.ones_like(after.moved), atol=1e-6, rtol=0)
    assert bool((after.weights >= 0).all())
    assert torch.equal(after.weights[~after.selected], weights[~after.selected])
    assert not after.selected[1, :, 0].any()
    text = (~sinks & ~image)[:, None, None].expand_as(weights)
    assert torch.equal(after.weights[text], weights[text])
    before = (weights * sinks[:, None, None]).sum(-1)
    torch.testing.assert_close(after.moved, moved * before * after.selected)


def test_rows_are_selected_by_their_image_and_its_sinks():
    weights, sinks, image, rows = case()
    after = redistribute_attention(weights, sinks, image, rows, rho=0.7, min_mass=0.3)
    for b in range(2):
        for h in range(3):
            for q in range(5):
                row = weights[b, h, q]
                mass = row[image[b]].sum()
                free = row[image[b] & ~sinks[b]].sum()
                expected = bool(mass >= 0.3 and free / mass >= 0.7 and rows[b, q])
                assert bool(after.selected[b, h, q]) is expected
    assert 0 < int(after.selected.sum()) < after.selected.numel()


def test_ratios_between_receivers_stay():
    weights, sinks, image, rows = case()
    after = redistribute_attention(weights, sinks, image, rows, rho=0.0, min_mass=0.0)
    free = (image & ~sinks)[0]
    old, new = weights[0, :, :, free], after.weights[0, :, :, free]
    torch.testing.assert_close(new / new.sum(-1, keepdim=True), old / old.sum(-1, keepdim=True))


@pytest.mark.parametrize("settings", [{"moved": 0.0}, {"rho": 1.5}])
def test_settings_that_change_nothing(settings):
    weights, sinks, image, rows = case()
    after = redistribute_attention(weights, sinks, image, rows, **settings)
    assert torch.equal(after.weights, weights)
    assert not after.selected.any()


def test_everything_moved_leaves_sinks_without_attention():
    weights, sinks, image, rows = case()
    after = redistribute_attention(weights, sinks, image, rows, moved=1.0, rho=0.0, min_mass=0.0)
    assert after.selected[0].all()
    assert not after.weights[0, :, :, sinks[0]].any()


def test_an_image_of_sinks_only_or_none_changes_nothing():
    weights, sinks, image, rows = case()
    for mask in (sinks | image, sinks):
        after = redistribute_attention(weights, mask, mask & image, rows, rho=0.0, min_mass=0.0)
        assert torch.equal(after.weights, weights)
    none = torch.zeros_like(image)
    assert torch.equal(redistribute_attention(weights, sinks, none, rows, rho=0.0, min_mass=0.0).weights, weights)


def test_the_published_conventions_differ_where_said():
    weights, sinks, image, rows = case()
    text_only = sinks & ~image
    ours = redistribute_attention(weights, text_only, image, rows, rho=0.5)
    theirs = redistribute_attention(weights, text_only, image, rows, rho=0.5, needs_visual_sink=True)
    assert ours.selected.any()
    assert not theirs.selected.any()
    loose = redistribute_attention(weights, sinks, image, rows, rho=0.9, head_rule="sink_share")
    strict = redistribute_attention(weights, sinks, image, rows, rho=0.9)
    assert int(loose.selected.sum()) > int(strict.selected.sum())


def test_scores_do_not_depend_on_scale_or_other_dimensions():
    x = torch.randn(2, 5, 16)
    x[0, 1, 3], x[1, 2, 9] = 60.0, 60.0
    scores = sink_scores(x, (3,))
    torch.testing.assert_close(sink_scores(x * 7, (3,)), scores, rtol=1e-4, atol=1e-4)
    assert float(scores[0, 1]) > 3
    assert float(scores[1, 2]) < 1
    assert sink_scores((x * 100).half(), (3,)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s, i, r: redistribute_attention(w, s, i, r, moved=1.2), "moved"),
        (lambda w, s, i, r: redistribute_attention(w, s, i, r, rho=-0.1), "rho"),
        (lambda w, s, i, r: redistribute_attention(w, s, i, r, head_rule="all"), "head_rule"),
        (lambda w, s, i, r: redistribute_attention(w.log(), s, i, r), "softmax"),
        (lambda w, s, i, r: redistribute_attention(w * torch.nan, s, i, r), "softmax"),
        (lambda w, s, i, r: sink_scores(torch.randn(1, 2, 4), (4,)), "0 to 3"),
        (lambda w, s, i, r: sink_scores(torch.randn(1, 2, 4), ()), "sink dimensions"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*case())
