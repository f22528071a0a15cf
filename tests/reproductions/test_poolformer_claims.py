"""PoolFormer's reproduction: its data, its variants and its verdicts."""

import pytest
import torch

from cenote.reproductions import available
from cenote.reproductions.poolformer import digit_findings
from cenote.reproductions.poolformer_cost import ATTENTION_UNIT, POOL_UNIT, cost_findings
from cenote.reproductions.poolformer_digits import VARIANTS, digit_accuracy, digits
from cenote.reproductions.poolformer_exact import exact_findings
from cenote.reproductions.poolformer_figure import draw
from cenote.reproductions.run import load_reproduction

SCORES = {
    "pooling": [90.0, 80.0], "identity": [80.0, 79.0], "random matrix": [85.0, 75.0], "attention": [70.0, 90.0],
    "no residual": [10.0, 12.0], "no MLP": [50.0, 15.0], "no residual, no LayerScale": [40.0, 50.0],
}  # fmt: skip


def test_it_is_offered():
    assert "poolformer" in available()
    assert load_reproduction("poolformer").claim


def test_parts_of_the_digits():
    (images, targets), (test, answers) = digits()
    assert (images.shape, test.shape) == ((1200, 1, 8, 8), (597, 1, 8, 8))
    assert abs(images.mean()) < 1e-5
    assert images.std() == pytest.approx(1, abs=1e-4)
    assert set(targets.tolist()) == set(answers.tolist()) == set(range(10))


def test_a_seed_gives_the_same_accuracy_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    first = digit_accuracy("pooling", 1, steps=8)
    assert torch.equal(torch.rand(1), before)
    assert digit_accuracy("pooling", 1, steps=8) == first
    assert digit_accuracy("pooling", 1, steps=100) > max(first, 30)


@torch.no_grad()
def test_verdicts_follow_the_scores():
    found = digit_findings(SCORES, quick=True)
    assert set(SCORES) == set(VARIANTS)
    assert [each.verdict for each in found] == [
        "inconclusive", "holds", "inconclusive", "does not hold", "inconclusive", "holds", "inconclusive",
    ]  # fmt: skip
    assert found[0].values == (10.0, 1.0)


def test_exact_properties_hold():
    found = exact_findings()
    assert len(found) >= 12
    assert [each.claim for each in found if each.verdict != "holds"] == []


def test_cost_curves_and_figure(tmp_path):
    cost = cost_findings((16, 64), rounds=1)
    assert [each.unit for each in cost] == [POOL_UNIT, ATTENTION_UNIT, "x"]
    assert [len(each.values) for each in cost] == [2, 2, 1]
    assert cost[2].measured == pytest.approx(cost[1].values[1] / cost[0].values[1])
    draw([*digit_findings(SCORES, quick=True), *cost], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
