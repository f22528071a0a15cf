"""Additive-angular-margin softmax."""

import math

import pytest
import torch
import torch.nn.functional as F

from cenote.tuning.margin import AAMSoftmax, additive_angular_margin, speaker_vectors


def batch(count=40, dim=12, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator), torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5])
def test_the_own_class_is_seen_at_a_larger_angle(margin):
    angles = torch.linspace(0.01, math.pi - 0.01, 50, dtype=torch.float64)
    cosine = angles.cos()[:, None, None].repeat(1, 1, 3)
    logits = additive_angular_margin(cosine, torch.ones(50, dtype=torch.long), margin, scale=30.0)
    torch.testing.assert_close(logits[..., [0, 2]], 30 * cosine[..., [0, 2]])
    past = angles + margin >= math.pi
    expected = torch.where(past, angles.cos() - margin * math.sin(margin), (angles + margin).cos())
    torch.testing.assert_close(logits[:, 0, 1], 30 * expected)
    assert bool(past.any()) == (margin > 0.01)
    assert bool((logits[1:, 0, 1] < logits[:-1, 0, 1]).all())  # falls over the whole half circle


def test_several_heads_average_their_cross_entropies_and_probabilities():
    x, labels = batch()
    torch.manual_seed(0)
    loss = AAMSoftmax(12, 7, num_heads=3, margin=0.3, scale=20.0)
    out = loss(x, labels)
    each, probabilities = [], []
    for part, weight in zip(x.chunk(3, dim=1), loss.weight, strict=True):
        angle = (F.normalize(part, dim=1) @ F.normalize(weight, dim=0)).clamp(-1, 1).acos()
        moved = torch.where(angle + 0.3 < math.pi, (angle + 0.3).cos(), angle.cos() - 0.3 * math.sin(0.3))
        logits = 20 * torch.where(F.one_hot(labels, 7).bool(), moved, angle.cos())
        each.append(F.cross_entropy(logits, labels))
        probabilities.append(logits.softmax(dim=1))
    torch.testing.assert_close(out.loss, torch.stack(each).mean())
    torch.testing.assert_close(out.probabilities, torch.stack(probabilities).mean(dim=0))
    assert out.loss.requires_grad
    assert not out.probabilities.requires_grad


def test_gradients_are_finite_on_and_opposite_the_class_direction():
    loss = AAMSoftmax(4, 2)
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, -1.0], [0, 0], [0, 0], [0, 0]])[None])
    x = torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]], requires_grad=True)
    out = loss(x, torch.tensor([0, 0]))
    out.loss.backward()
    assert bool(x.grad.isfinite().all())
    assert bool(loss.weight.grad.isfinite().all())
    # Straight ahead the angle is the margin; opposite, the continuation costs scale * (2 + m sin m) above the other.
    near = math.log1p(math.exp(30 * (-1 - math.cos(0.2))))
    far = 30 * (2 + 0.2 * math.sin(0.2))
    assert out.loss.item() == pytest.approx((near + far) / 2, rel=1e-3)


def test_half_precision_is_computed_in_single():
    x, labels = batch()
    loss = AAMSoftmax(12, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = loss(x.bfloat16(), labels).loss
    torch.testing.assert_close(narrow, loss(x.bfloat16().float(), labels).loss)


def test_classes_come_apart_in_training():
    torch.manual_seed(0)
    x, labels = batch(200)
    linear, loss = torch.nn.Linear(12, 8), AAMSoftmax(8, 7, scale=10.0)
    optimiser = torch.optim.Adam([*linear.parameters(), *loss.parameters()], lr=0.05)
    values = []
    for _ in range(60):
        optimiser.zero_grad()
        out = loss(linear(x), labels)
        out.loss.backward()
        optimiser.step()
        values.append(out.loss.item())
    assert values[-1] < 0.6 * values[0]


def test_weights_from_the_official_name():
    weight = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0))
    state = {"aam_softmax.weight": weight, "encoder.x": torch.zeros(1)}
    loss = AAMSoftmax.from_reference(state, num_loss_heads=2, num_classes=7, aam_margin=0.4, aam_scale=10, net="ecapa")
    assert torch.equal(loss.weight, weight)
    assert (loss.margin, loss.scale, loss.dim) == (0.4, 10, 12)
    with pytest.raises(ValueError, match="num_classes=8 contradicts"):
        AAMSoftmax.from_reference(state, num_classes=8)
    with pytest.raises(ValueError, match=r"no aam_softmax\.weight"):
        AAMSoftmax.from_reference({})


def test_speaker_vectors_are_unit_parts():
    x, _ = batch()
    vectors = speaker_vectors(x, 4)
    assert vectors.shape == (40, 4, 3)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(40, 4))
    torch.testing.assert_close(vectors[:, 1], F.normalize(x[:, 3:6], dim=1))


def test_bad_input_is_refused():
    x, labels = batch()
    loss = AAMSoftmax(12, 7)
    for call, message in (
        (lambda: loss(x, labels + 7), r"labels must lie in 0..6, got 7 to"),
        (lambda: loss(x, labels - 1), r"labels must lie in 0..6, got -1 to"),
        (lambda: loss(x, labels[:-1]), "one label an item"),
        (lambda: loss(x[:, :-1], labels), r"expected embeddings \(batch, 12\)"),
        (lambda: AAMSoftmax(12, 7, num_heads=5), "num_heads must divide dim"),
        (lambda: AAMSoftmax(12, 1), "num_classes must be at least 2"),
        (lambda: AAMSoftmax(12, 7, margin=-0.1), r"margin in \[0, pi\)"),
        (lambda: AAMSoftmax(12, 7, scale=0.0), "positive scale"),
        (lambda: speaker_vectors(x, 5), "num_heads must divide the embedding width 12"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
