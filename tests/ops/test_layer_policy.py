"""The dynamic program over layers' overlaps, and what goes into it."""

import itertools

import pytest
import torch

from cenote.ops.layer_policy import (
    allowed_changes,
    choose_full_layers,
    merge_overlap,
    plan_sources,
    plan_sources_with_overlap,
)


def random_overlap(layers, seed, sets=1, levels=None):
    g = torch.Generator().manual_seed(seed)
    overlap = torch.rand(sets, layers, layers, generator=g)
    if levels:  # many ties
        overlap = (overlap * levels).round() / levels
    overlap = overlap.triu(1)
    overlap.diagonal(dim1=1, dim2=2).fill_(1.0)
    return overlap


def every_path(layers, max_changes):
    """All sources: each layer after the first keeps the last one's source or is its own."""
    for own in itertools.product((False, True), repeat=layers - 1):
        if sum(own) > max_changes:
            continue
        sources = [0]
        for layer, changes in enumerate(own, start=1):
            sources.append(layer if changes else sources[-1])
        yield sources


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("layers", range(1, 9))
def test_the_minimum_is_the_best_of_all_paths(layers, levels):
    for seed in range(6):
        overlap = random_overlap(layers, 100 * layers + seed, sets=1 + seed % 3, levels=levels)
        for allowed in range(layers + 1):
            policy = plan_sources(overlap, allowed)
            worst = overlap.amin(dim=0)
            best = max(min(float(worst[i, j]) for j, i in enumerate(path)) for path in every_path(layers, allowed))
            assert policy.minimum == best
            assert list(policy.sources) in list(every_path(layers, allowed))
            assert policy.changes == sum(i == j for j, i in enumerate(policy.sources)) - 1 <= allowed
            assert policy.minimum == min(float(worst[i, j]) for j, i in enumerate(policy.sources))
            total = sum(float(each[i, j]) for each in overlap.double() for j, i in enumerate(policy.sources))
            assert policy.total == pytest.approx(total)


def test_the_sum_breaks_ties_of_the_minimum():
    overlap = torch.eye(3)
    overlap[0, 1], overlap[0, 2], overlap[1, 2] = 0.5, 0.5, 0.9
    # With one change: (0, 0, 2) sums to 2.5, (0, 1, 1) to 2.9; the least overlap of the latter is larger anyway.
    assert plan_sources(overlap[None], 1).sources == (0, 1, 1)
    overlap[0, 1], overlap[1, 2] = 0.8, 0.5
    assert plan_sources(overlap[None], 1).sources == (0, 0, 2)
    assert plan_sources(overlap[None], 0) == ((0, 0, 0), 0, 0, 0.5, pytest.approx(2.3))


def test_of_equals_the_lowest_source_and_the_fewest_changes_are_kept():
    assert plan_sources(torch.ones(5, 5).triu()[None], 3).sources == (0, 0, 0, 0, 0)


def test_constant_overlap_gives_one_source_to_all_layers_that_are_not_full():
    overlap = merge_overlap(torch.ones(2, 8, 8).triu(), full=(0, 1))
    policy = plan_sources(overlap[None], allowed_changes(8, 2, 0.75, 0.3))
    assert policy.sources == (0, 1, 2, 2, 2, 2, 2, 2)


def test_an_isolated_full_layer_takes_two_changes_and_the_budget_is_raised_for_it():
    overlap = merge_overlap(torch.ones(1, 6, 6).triu(), full=(3,))[None]
    assert plan_sources(overlap, 1).minimum == 0
    policy = plan_sources_with_overlap(overlap, 1)
    assert policy == ((0, 0, 0, 3, 4, 4), 2, 2, 1.0, 6.0)
    assert plan_sources_with_overlap(overlap, 4).max_changes == 4


def test_allowed_changes():
    assert allowed_changes(10, 2, 0.8, 0.3) == 5
    assert allowed_changes(36, 4, 0.9, 0.3) == 14
    for sparsity, compute_ratio in ((0, 0.3), (1, 0.3), (0.5, 0), (0.5, 1.1)):
        with pytest.raises(ValueError, match="must lie in"):
            allowed_changes(10, 2, sparsity, compute_ratio)


def test_full_layers_are_the_most_spread_out_without_outliers():
    ratio = torch.tensor([0.3, 0.2, 0.5, 0.4]).expand(2, 9, 4).clone()
    assert choose_full_layers(ratio, 0.5) == (2, 3)
    ratio[:, 4, 1] = 100.0  # one wild step
    assert choose_full_layers(ratio, 0.5) == (2, 3)
    assert choose_full_layers(ratio, 0.9) == (2,)
    assert choose_full_layers(ratio, 0.5, forced=(1,)) == (1, 2)
    assert choose_full_layers(ratio, 0.9, forced=(0, 1)) == (0, 1)


def test_clipping_is_at_the_quartiles_widened():
    series = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0])
    expected = (0.1 + 0.2 + 0.3 + 0.4 + (0.4 + 1.5 * 0.2)) / 5  # quartiles 0.2 and 0.4
    lower, higher = torch.full((5,), expected - 1e-4), torch.full((5,), expected + 1e-4)
    assert choose_full_layers(torch.stack([series, lower], dim=1)[None], 0.5) == (0,)
    assert choose_full_layers(torch.stack([series, higher], dim=1)[None], 0.5) == (1,)


def test_merged_overlap_is_the_least_of_the_heads_or_their_mean():
    overlap = random_overlap(4, 3, sets=2)
    least, mean = merge_overlap(overlap, (1,)), merge_overlap(overlap, (1,), "mean")
    assert least[0, 2] == min(overlap[0, 0, 2], overlap[1, 0, 2])
    torch.testing.assert_close(mean[0, 2], (overlap[0, 0, 2] + overlap[1, 0, 2]) / 2)
    assert least[0, 1] == least[1, 2] == mean[1, 3] == 0
    assert least.diagonal().eq(1).all()
    with pytest.raises(ValueError, match="'min' or 'mean'"):
        merge_overlap(overlap, (1,), "max")


def test_refuses_what_cannot_be_planned():
    with pytest.raises(ValueError, match="calibration is empty"):
        plan_sources(torch.zeros(0, 4, 4), 2)
    with pytest.raises(ValueError, match="at least 0"):
        plan_sources(torch.eye(4)[None], -1)
    with pytest.raises(ValueError, match="no calibration steps"):
        choose_full_layers(torch.zeros(2, 0, 4), 0.5)
    with pytest.raises(ValueError, match=r"lie in \(0, 1\)"):
        choose_full_layers(torch.zeros(2, 3, 4), 1.0)
