"""The in-context classification stream: what its sequences show, ask and leave out."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from cenote.worlds.context_classification import ContextClassification, ContextClassificationDataset

SMALL = ContextClassification(num_classes=64, num_labels=16, pairs=4, dim=31, max_pairs=8)


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("burstiness", [1, 2, 4])
@pytest.mark.parametrize("p_fresh", [0.0, 1.0])
def test_bursty_sequences(distinct, burstiness, p_fresh):
    world = replace(SMALL, pairs=8, burstiness=burstiness, distinct_labels=distinct, p_fresh=p_fresh)
    batch = world.sample(400, 0)
    context, target = batch.classes[:, :-1], batch.classes[:, -1:]
    counts = (context[:, :, None] == context[:, None]).sum(dim=2)
    assert bool((counts == burstiness).all())
    assert bool((context == target).any(dim=1).all())
    assert torch.equal(batch.labels, context % 16)
    assert torch.equal(batch.targets, target[:, 0] % 16)
    different = len({tuple(sorted(row)) for row in batch.labels.tolist()})
    assert different > 100
    repeats = [len(set(row)) == 8 // burstiness for row in batch.labels.tolist()]
    assert all(repeats) if distinct or burstiness > 4 else not all(repeats)
    assert bool((batch.classes >= 64).all()) == (p_fresh == 1)
    assert len(set(batch.classes.flatten().tolist())) > 0.9 * (128 if p_fresh else 64)
    # Every place of the context is asked for alike.
    first = (context == target).int().argmax(dim=1) if burstiness == 1 else None
    if first is not None:
        assert torch.bincount(first, minlength=8).min() > 400 / 8 * 0.6


def test_tokens_are_positions_then_contents():
    batch = SMALL.sample(500, 1)
    assert batch.inputs.shape == (500, 9, 17 + 31)
    place, content = batch.inputs[..., :17], batch.inputs[..., 17:]
    offset = place[:, 0].argmax(dim=1)
    assert sorted(set(offset.tolist())) == list(range(17 - 9 + 1))
    for i in range(9):
        assert torch.equal(place[:, i], torch.eye(17)[offset + i])
    assert torch.equal(content[:, 1::2], SMALL.label_vectors[batch.labels])
    items = content[:, ::2]
    assert items.square().sum(dim=-1).mean().item() == pytest.approx(1, abs=0.05)
    noise = (1 + 0.01) ** 0.5 * items - SMALL.class_means[batch.classes]
    assert noise.square().sum(dim=-1).mean().item() == pytest.approx(0.01, rel=0.05)
    same = items[:, :-1][batch.classes[:, :-1] == batch.classes[:, -1:]]
    assert not torch.equal(same, items[:, -1])  # the target is drawn with noise of its own


def test_shares_of_bursty_and_fresh_sequences():
    world = replace(SMALL, p_bursty=0.25, p_fresh=0.4, num_classes=1024)
    batch = world.sample(4000, 0)
    fresh = batch.classes[:, -1] >= 1024
    assert fresh.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert bool((fresh[:, None] == (batch.classes >= 1024)).all())
    shown = (batch.classes[:, :-1] == batch.classes[:, -1:]).any(dim=1)
    assert bool(shown[fresh].all())
    assert shown[~fresh].float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_frequencies_follow_zipf_where_they_are_used():
    rates = torch.arange(1, 65).double().pow(-1.0)
    rates = rates / rates.sum()
    for settings in ({"p_bursty": 0.0}, {"burstiness": 0}):
        classes = replace(SMALL, zipf=1.0, **settings).sample(4000, 0).classes
        assert torch.bincount(classes[:, -1], minlength=64).tolist()[0] / 4000 == pytest.approx(
            rates.tolist()[0], rel=0.1
        )
        share = torch.bincount(classes.flatten(), minlength=64).double() / classes.numel()
        torch.testing.assert_close(share, rates, atol=0.008, rtol=0)
    # One class after the other without repetition, each by frequency: the first two of the race.
    world = replace(SMALL, zipf=1.0, distinct_labels=False, burstiness=2)
    shown = torch.zeros(64)
    for row in world.sample(4000, 0).classes[:, :-1]:
        shown[row.unique()] += 1 / 4000
    expected = rates + torch.tensor(
        [sum(rates[i] * rates[j] / (1 - rates[i]) for i in range(64) if i != j) for j in range(64)]
    )
    torch.testing.assert_close(shown, expected.float(), atol=0.025, rtol=0)
    even = replace(SMALL, zipf=1.0).sample(4000, 0).classes  # distinct labels know no frequencies
    assert torch.bincount(even[:, -1], minlength=64).max() < 4000 / 64 * 1.6


def test_evaluation_sets():
    world = replace(SMALL, p_bursty=0.3, p_fresh=0.5)
    ic, ic2, iw = (each.sample(800, 3) for each in (world.in_context(), world.in_context_shifted(), world.in_weights()))
    assert bool((ic.classes >= 64).all())
    assert bool((ic2.classes < 64).all())
    assert torch.equal(ic2.targets, (ic2.classes[:, -1] + 1) % 16)
    assert torch.equal(ic2.labels, (ic2.classes[:, :-1] + 1) % 16)
    assert bool((iw.classes < 64).all())
    assert not bool((iw.classes[:, :-1] == iw.classes[:, -1:]).any())
    assert torch.equal(iw.targets, iw.classes[:, -1] % 16)
    bare = replace(SMALL, burstiness=0)
    assert bool((bare.in_context().sample(10, 0).classes >= 64).all())


def test_best_predictor():
    world = replace(SMALL, dim=63, p_bursty=0.5, p_fresh=0.5)
    for each in (world, world.in_context(), world.in_context_shifted(), world.in_weights()):
        batch = each.sample(1000, 0)
        assert (each.best(batch) == batch.targets).float().mean() > 0.995, each
    noisy = replace(world, noise=3.0)
    batch = noisy.sample(1000, 0)
    assert 0.1 < (noisy.best(batch) == batch.targets).float().mean() < 0.9


def test_seeds_and_blocks():
    one, same, other = SMALL.sample(50, 0), SMALL.sample(50, 0), replace(SMALL, seed=1).sample(50, 0)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert torch.equal(one.classes, other.classes)
    assert not torch.equal(one.inputs, other.inputs)
    block = next(replace(SMALL, p_fresh=1.0).batches(20, 0, ahead=3))
    assert block.inputs.shape == (3, 20, 9, 48)
    # Fresh classes are fresh for each batch: one number stands for different means.
    classes, items = block.classes[..., -1], block.inputs[:, :, -1, 17:]
    for number in classes.unique():
        found = [items[b][classes[b] == number] for b in range(3)]
        means = [each.mean(dim=0) for each in found if len(each)]
        assert all((a - b).norm() > 0.5 for i, a in enumerate(means) for b in means[:i])


def test_a_loader_reads_the_stream():
    data = ContextClassificationDataset(SMALL, batch=8, seed=5)
    loader = iter(DataLoader(data, batch_size=None))
    first, second = next(loader), next(loader)
    expected = SMALL.stream(8, 5)
    assert torch.equal(first.inputs, next(expected).inputs)
    assert torch.equal(second.inputs, next(expected).inputs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"burstiness": 3}, "burstiness must divide"),
        ({"burstiness": 4}, "be smaller"),
        ({"burstiness": -1}, "burstiness must"),
        ({"num_classes": 65}, "num_labels must divide"),
        ({"num_fresh": 120}, "num_labels must divide"),
        ({"num_labels": 2, "num_classes": 64}, "cannot be different"),
        ({"pairs": 9}, "at most max_pairs"),
        ({"p_bursty": 1.1}, "0..1"),
        ({"p_fresh": -0.1}, "0..1"),
        ({"noise": -0.1}, "negative"),
        ({"zipf": -1.0}, "negative"),
        ({"dim": 0}, "at least 1"),
        ({"burstiness": 0, "p_fresh": 0.5}, "bursts"),
    ],
)
def test_bad_input(settings, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **settings)


def test_a_class_that_is_nearly_always_drawn_cannot_be_kept_out():
    with pytest.raises(ValueError, match="too rare"):
        replace(SMALL, zipf=60.0).in_weights().sample(50, 0)
