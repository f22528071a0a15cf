"""Attention heads on prompts of in-context regression, their training and their reduction to two numbers."""

import pytest
import torch

from cenote.inspection.circuits import attention_circuits
from cenote.ops.circuits import HeadCircuits
from cenote.reproductions.icl_linear_regression_exact import planted_heads
from cenote.worlds.linear_regression import LinearRegression, Prompts
from cenote.worlds.regression_attention import RegressionAttention, fit_regression
from cenote.worlds.regression_reduction import reduce_heads


def plain(model, prompts, linear=None):
    """Prompt by prompt, head by head, as the formula reads."""
    answers = []
    for i, mask in enumerate(prompts.mask):
        tokens = torch.cat([prompts.x[i], prompts.y[i]], dim=1)[mask]
        asked = torch.cat([prompts.query[i], torch.zeros(model.outputs)])
        total = 0
        for k, q, v, o in zip(model.key, model.query, model.value, model.output, strict=True):
            scores = torch.stack([(k @ token) @ (q @ asked) for token in tokens])
            weights = scores.softmax(dim=0) if linear is None else scores / (linear or len(tokens))
            total = total + o @ v @ (weights @ tokens)
        answers.append(total[model.features :])
    return torch.stack(answers)


@pytest.mark.parametrize(("attention", "divisor"), [("softmax", None), ("linear", None), ("linear", 7.0)])
def test_prediction_is_the_formula(attention, divisor):
    torch.manual_seed(0)
    world = LinearRegression(features=3, length=7, min_length=2, outputs=2)
    prompts = world.sample(6, 0)
    model = RegressionAttention(3, 3, 2, attention, divisor, init_std=0.5)
    with torch.no_grad():
        expected = plain(model, prompts, None if attention == "softmax" else divisor or 0)
        prediction, weights = model(prompts, return_attention=True)
    torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
    assert weights.masked_select(~prompts.mask[:, None]).abs().max() == 0
    if attention == "softmax":
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(6, 3))


def test_runs_do_not_depend_on_each_other():
    world = LinearRegression(features=3, length=8)
    together = fit_regression(RegressionAttention(3, 2, seeds=(4, 7)), world, 20, batch=16)
    alone = fit_regression(RegressionAttention(3, 2, seeds=(7,)), world, 20, batch=16)
    for name in ("query", "key", "value", "output"):
        torch.testing.assert_close(getattr(together, name)[1], getattr(alone, name)[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together.key[0], together.key[1], atol=1e-2)


def test_training_lowers_the_risk_and_tells_every_loss():
    losses = []
    world = LinearRegression(features=2, length=10)
    fit_regression(
        RegressionAttention(2, 2, seeds=(0, 1)), world, 400, batch=64, lr=1e-2, watch=lambda s, l: losses.append(l)
    )
    losses = torch.stack(losses)
    assert losses.shape == (400, 2)
    assert bool((losses[-50:].mean(dim=0) < 0.65 * losses[:20].mean(dim=0)).all())


def test_reduction_finds_what_was_planted():
    omega, mu = [0.2, -0.3, 1e-4], [1.0, -1.4, 0.4]
    heads = reduce_heads(planted_heads(omega, mu, 5).circuits, 5)
    torch.testing.assert_close(heads.omega[:, 0], torch.tensor(omega, dtype=torch.float64))
    torch.testing.assert_close(heads.mu[:, 0], torch.tensor(mu, dtype=torch.float64))
    assert heads.step.item() == pytest.approx(0.2 + 0.42 + 4e-5)
    assert heads.zero_sum.item() == pytest.approx(0, abs=1e-12)
    assert heads.active.tolist() == [True, True, False]
    assert heads.signs_match.tolist() == [True, True, True]
    torch.testing.assert_close(heads.diagonal_energy, torch.ones(3).double())
    for name in ("homogeneity", "label_row", "other_entries"):
        assert getattr(heads, name).abs().max() < 1e-9, name
    torch.testing.assert_close(heads.matrix[0], heads.step * torch.eye(5).double())


def test_pattern_scores_by_hand():
    kq = torch.tensor([[[2.0, 1.0, 9.0], [0.0, 4.0, 9.0], [3.0, 0.0, 9.0]]])
    ov = torch.tensor([[[7.0, 7.0, 7.0], [7.0, 7.0, 7.0], [0.5, -1.0, 2.0]]])
    eye = torch.eye(3)[None]
    heads = reduce_heads(HeadCircuits(kq, eye, ov, eye, scale=0.5), 2)
    assert heads.omega.item() == 1.5
    assert heads.diagonal_energy.item() == pytest.approx(20 / 21)
    assert heads.homogeneity.item() == pytest.approx(1 / 3)
    assert heads.label_row.item() == pytest.approx((9 / 30) ** 0.5)
    assert heads.other_entries.item() == 0.5
    assert heads.zero_sum.item() == 1
    assert heads.step.item() == 3


def test_reduction_of_two_tasks():
    kq = torch.diag_embed(torch.tensor([[1.0, 1.0, 3.0, 0.0, 0.0], [-1.0, -1.0, 5.0, 0.0, 0.0]]))
    ov = torch.zeros(2, 5, 5)
    ov[0, 3, 3], ov[1, 3, 3], ov[0, 4, 4], ov[1, 4, 3] = 2.0, -2.0, 4.0, 1.0
    eye = torch.eye(5).expand(2, 5, 5)
    heads = reduce_heads(HeadCircuits(kq, eye, ov, eye), 3, ((0, 1), (2,)))
    assert heads.omega.tolist() == [[1, 3], [-1, 5]]
    assert heads.mu.tolist() == [[2, 4], [-2, 0]]
    assert heads.step.tolist() == [4, 12]
    assert heads.zero_sum.tolist() == [0, 1]
    assert heads.other_entries.tolist() == [0, 0.5]


def test_runs_are_reduced_one_by_one():
    model = RegressionAttention(4, 3, seeds=(0, 1))
    both = reduce_heads(model.circuits, 4)
    single = RegressionAttention(4, 3)
    single.load_state_dict({name: weight[1] for name, weight in model.state_dict().items()})
    one = reduce_heads(single.circuits, 4)
    for name in one.__dataclass_fields__:
        torch.testing.assert_close(getattr(both, name)[1], getattr(one, name))


def test_bad_input():
    for sizes in ({"features": 0}, {"heads": 0}, {"outputs": 0}, {"seeds": ()}):
        with pytest.raises(ValueError, match="at least"):
            RegressionAttention(**{"features": 2, **sizes})
    with pytest.raises(ValueError, match="'softmax' or 'linear'"):
        RegressionAttention(2, attention="cosine")
    for options in ({"divisor": 3.0}, {"attention": "linear", "divisor": 0.0}):
        with pytest.raises(ValueError, match="divisor"):
            RegressionAttention(2, **options)
    prompts = LinearRegression(features=3).sample(2, 0)
    with pytest.raises(ValueError, match="expected 2 features"):
        RegressionAttention(2)(prompts)
    with pytest.raises(ValueError, match="at least one real pair"):
        RegressionAttention(3)(Prompts(*prompts[:4], torch.zeros_like(prompts.mask)))
    with pytest.raises(ValueError, match="seeds"):
        fit_regression(RegressionAttention(3), LinearRegression(features=3), 1)
    circuits = RegressionAttention(3).circuits
    with pytest.raises(ValueError, match="wider than 4"):
        reduce_heads(circuits, 4)
    with pytest.raises(ValueError, match="one support"):
        reduce_heads(circuits, 3, ((0, 1), (2,)))
    with pytest.raises(ValueError, match="does not split into 5 heads"):
        attention_circuits(torch.nn.MultiheadAttention(4, 2), num_heads=5)
