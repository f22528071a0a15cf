"""COSTARR: its worked example, its identity, what must not change its scores, and what it refuses."""

import warnings

import pytest
import torch
from torch import nn

from cenote.inspection import CoStarr, load_open_set_score
from cenote.ops.open_set import metric_cosine

CLASSES, DIM = 4, 9


@pytest.fixture(scope="module")
def world():
    """A head, training items of which most are classified correctly, and test items."""
    g = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(CLASSES, DIM, generator=g), torch.randn(CLASSES, generator=g)
    labels = torch.arange(CLASSES).repeat(30)
    features = torch.randn(120, DIM, generator=g) + 0.8 * weight[labels]
    return weight, bias, features, labels, torch.randn(50, DIM, generator=g) + 0.3


def plain(world, parts="both", scale="none", similarity="half_shifted", confidence="min_max"):
    """The rule as it reads: item by item, both parts side by side."""
    weight, bias, features, labels, test = (t.double() if t.is_floating_point() else t for t in world)

    def joined(f, k):
        pre, post = f, weight[k] * f
        if scale == "unit":
            pre, post = pre / pre.norm(), post / post.norm()
        return torch.cat({"both": [pre, post], "pre": [pre], "post": [post]}[parts])

    train_logits = features @ weight.T + bias
    templates = []
    for k in range(CLASSES):
        kept = [i for i in range(len(labels)) if labels[i] == k and train_logits[i].argmax() == k]
        templates.append(torch.stack([joined(features[i], k) for i in kept]).mean(dim=0))
    scores = []
    for f in test:
        logits = weight @ f + bias
        k = int(logits.argmax())
        cosine = torch.cosine_similarity(joined(f, k), templates[k], dim=0)
        sim = (1 + cosine) / 2 if similarity == "half_shifted" else cosine
        spread = train_logits.max() - train_logits.min()
        conf = {"min_max": (logits[k] - train_logits.min()) / spread, "softmax": logits.softmax(0)[k], "none": 1}
        scores.append(conf[confidence] * sim)
    return torch.stack(scores).float()


def test_worked_example():
    train = torch.tensor([[2.0, 1.0], [4.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    score = CoStarr(torch.eye(2), torch.zeros(2)).fit(train, torch.tensor([0, 0, 1, 1]))
    item = torch.tensor([[3.0, 2.0]])
    assert score.score(item).item() == pytest.approx(0.65941, abs=5e-6)
    assert CoStarr(torch.eye(2), confidence="none").fit(train, torch.tensor([0, 0, 1, 1])).score(
        item
    ).item() == pytest.approx(0.98911, abs=1e-5)
    assert score.predict(torch.tensor([[3.0, 2.0], [2.0, 3.0], [4.0, 1.0]]), 0.7).tolist() == [-1, -1, 0]
    assert score.predict(torch.tensor([[3.0, 2.0], [2.0, 3.0]]), 0.65).tolist() == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"parts": "pre"},
        {"parts": "post"},
        {"scale": "unit"},
        {"scale": "unit", "parts": "post"},
        {"scale": "unit", "parts": "pre"},
        {"similarity": "cosine", "confidence": "softmax"},
        {"confidence": "none"},
    ],
    ids=str,
)
def test_every_option_is_the_plain_rule(world, options):
    named = {"scale_parts" if key == "scale" else key: value for key, value in options.items()}
    score = CoStarr(*world[:2], **named).fit(*world[2:4])
    torch.testing.assert_close(score.score(world[4]), plain(world, **options), rtol=1e-5, atol=1e-6)


def test_concatenation_is_a_cosine_in_the_metric_one_plus_squared_weights():
    g = torch.Generator().manual_seed(0)
    x, m, w = torch.randn(3, 40, 12, generator=g, dtype=torch.float64).unbind(0)
    both = torch.cosine_similarity(torch.cat([x, w * x], 1), torch.cat([m, w * m], 1))
    torch.testing.assert_close(metric_cosine(x, m, 1 + w**2), both, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(both, torch.cosine_similarity(x, m), atol=0.01)
    small = 1e-3 * w
    torch.testing.assert_close(metric_cosine(x, m, 1 + small**2), torch.cosine_similarity(x, m), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", ["none", "unit"])
def test_batches_and_order_change_nothing(world, scale):
    weight, bias, features, labels, test = world
    whole = CoStarr(weight, bias, scale_parts=scale).fit(features, labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    pieces = list(zip(features[order].split(7), labels[order].split(7), strict=True))
    generated = CoStarr(weight, bias, scale_parts=scale).fit(piece for piece in pieces)
    grown = CoStarr(weight, bias, scale_parts=scale)
    for piece in pieces:
        grown.partial_fit(*piece)
    for other in (generated, grown):
        torch.testing.assert_close(other.score(test), whole.score(test), rtol=0, atol=1e-6)
    alone = torch.cat([whole.score(item[None]) for item in test])
    torch.testing.assert_close(alone, whole.score(test), rtol=0, atol=1e-6)
    again = whole.fit(features, labels)
    torch.testing.assert_close(again.score(test), grown.score(test), rtol=0, atol=1e-6)


def test_permuting_classes_permutes_only_the_labels(world):
    weight, bias, features, labels, test = world
    order = torch.tensor([2, 0, 3, 1])
    rank = order.argsort()
    one = CoStarr(weight, bias).fit(features, labels)
    other = CoStarr(weight[order], bias[order]).fit(features, rank[labels])
    torch.testing.assert_close(other.score(test), one.score(test), rtol=0, atol=1e-6)
    threshold = float(one.score(test).median())
    mine, theirs = one.predict(test, threshold), other.predict(test, threshold)
    assert torch.equal(torch.where(mine < 0, mine, rank[mine.clamp_min(0)]), theirs)
    assert 0 < int((mine < 0).sum()) < len(test)


def test_scaling_one_class_leaves_its_template_direction(world):
    weight, _, features, labels, test = world
    scaled = torch.where((labels == 1)[:, None], 5 * features, features)
    one, other = (CoStarr(weight, confidence="none").fit(x, labels) for x in (features, scaled))
    torch.testing.assert_close(other.score(test), one.score(test), rtol=0, atol=1e-6)


def test_similarity_lies_between_0_and_1_and_zero_features_in_the_middle(world):
    weight, bias, features, labels, test = world
    for scale in ("none", "unit"):
        score = CoStarr(weight, bias, confidence="none", scale_parts=scale).fit(features, labels)
        values = score.score(torch.cat([100 * test, -test, features, torch.zeros(1, DIM)]))
        assert values.min() >= 0
        assert values.max() <= 1
        assert values[-1] == 0.5


def test_a_class_never_classified_correctly_falls_back_to_all_its_items():
    weight = torch.eye(2)
    features, labels = torch.tensor([[2.0, 1.0], [3.0, 1.0], [5.0, 2.0]]), torch.tensor([0, 1, 1])
    score = CoStarr(weight, confidence="none").fit(features, labels)
    torch.testing.assert_close(score._means(), torch.tensor([[2.0, 1.0], [4.0, 1.5]], dtype=torch.float64))
    # One correct item later, the wrong ones no longer count, whichever batch they came in.
    score.partial_fit(torch.tensor([[1.0, 6.0], [9.0, 1.0]]), torch.tensor([1, 1]))
    torch.testing.assert_close(score._means()[1], torch.tensor([1.0, 6.0], dtype=torch.float64))


def test_half_precision_features_are_summed_in_double():
    features = torch.full((5000, 2), 100.0, dtype=torch.float16)
    features[:2500, 0], features[2500:, 1] = 101.0, 101.0
    labels = (torch.arange(5000) >= 2500).long()
    score = CoStarr(torch.eye(2)).fit(features, labels)
    assert score._means().tolist() == [[101.0, 100.0], [100.0, 101.0]]
    assert score.score(features[:1]).isfinite().all()


def test_negative_confidence_warns_or_is_clipped(world):
    weight, bias, features, labels, _ = world
    far = -50 * weight.sum(dim=0, keepdim=True) - 50 * bias @ weight
    head = torch.eye(2)
    train, classes = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 1])
    item = torch.tensor([[-3.0, -4.0]])
    with pytest.warns(UserWarning, match="below every training logit"):
        assert CoStarr(head).fit(train, classes).score(item) < 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CoStarr(head, clip=True).fit(train, classes).score(item) == 0
        CoStarr(weight, bias, confidence="softmax").fit(features, labels).score(far)


def test_files_bring_it_back_and_partial_fit_goes_on(world, tmp_path):
    weight, bias, features, labels, test = world
    score = CoStarr(weight, bias, parts="pre", clip=True).fit(features[:60], labels[:60])
    score.save_pretrained(tmp_path / "kept", threshold=0.25)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["open_set.json", "open_set.safetensors"]
    back = load_open_set_score(tmp_path / "kept")
    assert isinstance(back, CoStarr)
    assert (back.settings, back.notes) == (score.settings, {"threshold": 0.25})
    assert torch.equal(back.score(test), score.score(test))
    back.partial_fit(features[60:], labels[60:])
    whole = CoStarr(weight, bias, parts="pre", clip=True).fit(features, labels)
    torch.testing.assert_close(back.score(test), whole.score(test), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no open-set score"):
        load_open_set_score(tmp_path)


def refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_is_refused(world):
    weight, bias, features, labels, test = world
    fresh = CoStarr(weight, bias)
    refused(lambda: CoStarr(weight[:1], bias[:1]), "at least 2 classes")
    refused(lambda: CoStarr(weight / 0), "finite")
    refused(lambda: CoStarr(weight, parts="all"), "parts must be one of both, pre, post")
    refused(lambda: fresh.score(test), "not fitted")
    refused(lambda: fresh.predict(test, 0.5), "not fitted")
    refused(lambda: fresh.fit(features[:, :5], labels), r"features must be \(items, 9\)")
    refused(lambda: fresh.fit(features, labels + 1), r"0\.\.3, got 1\.\.4")
    refused(lambda: fresh.fit(features, labels - 1), r"0\.\.3, got -1\.\.2")
    refused(lambda: fresh.fit(features), "need as many labels, got None")
    refused(lambda: fresh.fit(features[labels != 2], labels[labels != 2]), r"class\(es\) \[2\] have no training item")
    refused(lambda: fresh.score(test), "not fitted")
    refused(lambda: fresh.fit([]), "no training items")
    broken = features.clone()
    broken[5, 1] = float("nan")
    refused(lambda: fresh.fit(broken, labels), r"not finite in item\(s\) \[5\]")
    fresh.fit(features, labels)
    refused(lambda: fresh.score(test[:, :3]), r"features must be \(items, 9\)")
    refused(lambda: fresh.score(test / 0), "not finite")
    flat = CoStarr(torch.zeros(2, 3), torch.ones(2))
    refused(lambda: flat.fit(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])), "all training logits are 1")


def test_own_logits_are_asked_for(world):
    weight, bias, _, _, test = world
    score = CoStarr(weight, bias)
    score.check_logits(test, test @ weight.T + bias)
    refused(lambda: score.check_logits(test, 16 * nn.functional.normalize(test) @ weight.T), "cosine heads do")
    refused(lambda: score.check_logits(test, test @ weight.T), "not the input of the last linear layer")
    refused(lambda: score.check_logits(test, torch.zeros(50, 3)), "expected logits")
