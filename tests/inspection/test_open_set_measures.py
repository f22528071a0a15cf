"""OSCR, AUOSCR, AUROC, FPR at 95 % TPR and OOSA against brute force and scikit-learn."""

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from cenote.ops.open_set import auoscr, auroc, best_threshold, fpr_at_tpr, open_set_accuracy, oscr_curve


def draw(seed, ties=True, items=60):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 4, (items,), generator=g)
    predictions = torch.where(torch.rand(items, generator=g) < 0.7, labels.clamp_min(0), 1)
    scores = torch.randn(items, generator=g) + (labels >= 0)
    return ((scores * 2).round() / 2 if ties else scores), predictions, labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_agrees_with_scikit_learn_and_the_definitions(seed, ties):
    scores, predictions, labels = draw(seed, ties)
    known = (labels >= 0).numpy()
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(known, scores.numpy()), abs=1e-12)
    fpr, tpr, _ = roc_curve(known, scores.numpy(), drop_intermediate=False)
    assert fpr_at_tpr(scores, labels) == pytest.approx(fpr[(tpr >= 0.95).argmax()], abs=1e-12)
    curve = oscr_curve(scores, predictions, labels)
    assert curve.thresholds.tolist() == sorted(set(scores.tolist()), reverse=True)
    for t, f, c in zip(curve.thresholds, curve.fpr, curve.ccr, strict=True):
        unknown = labels < 0
        assert float(f) == pytest.approx(float((scores[unknown] >= t).double().mean()))
        hit = (predictions == labels) & (scores >= t)
        assert float(c) == pytest.approx(float(hit[~unknown].double().mean()))
    accuracy = float((predictions == labels)[labels >= 0].double().mean())
    assert auoscr(curve) <= accuracy
    assert float(curve.ccr[-1]) == pytest.approx(accuracy)
    assert auoscr(oscr_curve(scores, labels, labels)) == pytest.approx(auroc(scores, labels), abs=1e-12)


def test_order_of_ties_does_not_matter():
    scores, predictions, labels = draw(3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    one, other = (oscr_curve(*parts) for parts in ((scores, predictions, labels), (scores[order], predictions[order], labels[order])))  # noqa: E501  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("balance", [0.5, 0.2, 0.9])
def test_threshold_search_equals_brute_force(seed, balance):
    scores, predictions, labels = draw(seed)
    candidates = [*sorted(set(scores.tolist())), float("inf")]
    values = [open_set_accuracy(scores, predictions, labels, t, balance) for t in candidates]
    threshold, accuracy = best_threshold(scores, predictions, labels, balance)
    assert accuracy == pytest.approx(max(values), abs=1e-12)
    assert threshold == next(t for t, v in zip(candidates, values, strict=True) if v >= max(values) - 1e-12)


def test_open_set_accuracy_by_hand():
    scores, labels = torch.tensor([0.9, 0.8, 0.4, 0.6, 0.1]), torch.tensor([0, 1, 1, -1, -1])
    predictions = torch.tensor([0, 0, 1, 0, 0])
    # At 0.7 the first known is right, the second accepted as the wrong class, the third rejected; unknowns rejected.
    assert open_set_accuracy(scores, predictions, labels, 0.7) == pytest.approx(3 / 5)
    assert open_set_accuracy(scores, predictions, labels, 0.3) == pytest.approx(3 / 5)
    assert open_set_accuracy(scores, predictions, labels, 0.7, balance=0.2) == pytest.approx((0.2 + 1.6) / (0.6 + 1.6))
    assert best_threshold(scores, predictions, labels) == (pytest.approx(0.4), pytest.approx(3 / 5))


def test_rejecting_everything_may_be_best():
    scores, labels = torch.tensor([0.1, 0.9, 0.8]), torch.tensor([0, -1, -1])
    assert best_threshold(scores, torch.zeros(3, dtype=torch.int64), labels) == (float("inf"), pytest.approx(2 / 3))


def test_bad_input_is_refused():
    scores, predictions, labels = draw(0)
    for wrong in (labels.clamp_min(0), labels.clamp_max(-1)):
        for call in (auroc, fpr_at_tpr):
            with pytest.raises(ValueError, match="need known items"):
                call(scores, wrong)
        with pytest.raises(ValueError, match="need known items"):
            best_threshold(scores, predictions, wrong)
    with pytest.raises(ValueError, match="scores must be finite"):
        auroc(scores / 0, labels)
    with pytest.raises(ValueError, match="tpr"):
        fpr_at_tpr(scores, labels, 0.0)
    with pytest.raises(ValueError, match="balance"):
        open_set_accuracy(scores, predictions, labels, 0.0, balance=1.0)
