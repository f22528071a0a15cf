import math

import pytest
import torch

from cenote.probe import knn
from cenote.probe.knn import knn_grid, knn_scores


def world(train=40, test=13, dim=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    labels = torch.randint(classes, (train + test,), generator=generator)
    x = centres[labels] + 0.8 * torch.randn(train + test, dim, generator=generator)
    return x[:train], labels[:train], x[train:], labels[train:]


def by_hand(train, labels, item, k, temperature, classes):
    """Scores of one item, neighbour by neighbour."""
    cosine = [float(torch.dot(t, item) / (t.norm() * item.norm())) for t in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
    scores = [0.0] * classes
    for i in nearest:
        scores[int(labels[i])] += math.exp(cosine[i] / temperature)
    return torch.tensor(scores) / sum(scores)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.2), (40, 0.1)])
def test_scores_are_the_weighted_votes_of_the_neighbours(k, temperature):
    train, labels, test, _ = world()
    scores = knn_scores(train, labels, test, k, temperature, num_classes=6)
    expected = torch.stack([by_hand(train, labels, item, k, temperature, 6) for item in test])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_grid_holds_every_setting_temperature_outermost():
    train, labels, test, test_labels = world()
    rows = knn_grid(train, labels, test, test_labels, neighbours=(3, 1, 9), temperatures=(0.07, 0.5))
    assert [(row.temperature, row.k) for row in rows] == [(t, k) for t in (0.07, 0.5) for k in (3, 1, 9)]
    for row in rows:
        best = knn_scores(train, labels, test, row.k, row.temperature).argmax(1)
        assert row.top1 == pytest.approx((best == test_labels).double().mean().item())
        assert row.top5 == 1.0  # four classes
    assert 0.3 < rows[0].top1 < 1.0


def test_chunks_change_nothing(monkeypatch):
    train, labels, test, test_labels = world(test=11)
    whole = knn_grid(train, labels, test, test_labels, neighbours=(5,))
    scores = knn_scores(train, labels, test)
    for entries in (1, 3 * len(train), 11 * len(train)):
        monkeypatch.setattr(knn, "_CHUNK_ENTRIES", entries)
        assert knn_grid(train, labels, test, test_labels, neighbours=(5,)) == whole
        torch.testing.assert_close(knn_scores(train, labels, test), scores)


def test_top5_counts_the_five_best_classes():
    train, labels = torch.eye(8), torch.arange(8)
    test = torch.tensor([[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    hits = [knn_grid(train, labels, test, torch.tensor([y]), neighbours=(8,), temperatures=(0.1,))[0] for y in range(8)]
    assert [row.top1 for row in hits] == [1.0] + [0.0] * 7
    assert [row.top5 for row in hits] == [1.0] * 5 + [0.0] * 3


def test_a_small_temperature_does_not_overflow():
    train, labels, test, _ = world()
    scores = knn_scores(train, labels, test, 10, 1e-4)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.argmax(1), knn_scores(train, labels, test, 1).argmax(1))


def test_tokens_are_averaged_and_scale_is_irrelevant():
    train, labels, test, _ = world()
    generator = torch.Generator().manual_seed(1)
    noise, more = (torch.randn(len(x), 3, 6, generator=generator) for x in (train, test))
    tokens = train[:, None] + noise - noise.mean(1, keepdim=True)
    other = test[:, None] + more - more.mean(1, keepdim=True)
    expected = knn_scores(train, labels, test)
    torch.testing.assert_close(knn_scores(tokens, labels, other), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(knn_scores(train * 7, labels, test / 3), expected, rtol=1e-3, atol=1e-5)


def test_bad_input_is_refused():
    train, labels, test, test_labels = world()
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"number of training items 40, got {k}"):
            knn_scores(train, labels, test, k)
    with pytest.raises(ValueError, match=r"train labels must lie in 0\.\.2, got 0\.\.3"):
        knn_scores(train, labels, test, num_classes=3)
    with pytest.raises(ValueError, match=r"test labels must lie in 0\.\.3, got 0\.\.9"):
        knn_grid(train, labels, test, test_labels.clone().clamp(max=0) + torch.eye(13, dtype=torch.long)[0] * 9, (5,))
    with pytest.raises(ValueError, match="train labels must lie in"):
        knn_scores(train, labels - 1, test)
    with pytest.raises(ValueError, match=r"train labels must have shape \(40,\), got \(10,\)"):
        knn_scores(train, labels[:10], test)
    with pytest.raises(ValueError, match="temperature"):
        knn_scores(train, labels, test, temperature=0.0)
    with pytest.raises(ValueError, match="one width"):
        knn_scores(train, labels, test[:, :5])
    broken = test.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"test features are not finite in item\(s\) \[3\]"):
        knn_scores(train, labels, broken)
    with pytest.raises(ValueError, match="test items"):
        knn_scores(train, labels, test[:0])
