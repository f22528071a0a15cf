"""The world of in-context regression: its prompts, its predictors, its closed forms."""

from dataclasses import replace

import pytest
import torch

from cenote.worlds import linear_regression_theory as theory
from cenote.worlds.linear_regression import (
    LinearRegression,
    Prompts,
    debiased_gradient_step,
    gradient_step,
    least_squares,
    nearest_neighbours,
    ridge,
)

COVARIANCE = ((2.0, 0.5, 0.0), (0.5, 1.0, -0.3), (0.0, -0.3, 0.4))


def double(prompts):
    return Prompts(*(part if part.dtype == torch.bool else part.double() for part in prompts))


def test_prompts_are_regressions_with_the_stated_noise():
    world = LinearRegression(features=4, length=30, noise=0.0, outputs=2)
    prompts = double(world.sample(50, 0))
    beta = torch.linalg.lstsq(prompts.x, prompts.y).solution
    torch.testing.assert_close(prompts.x @ beta, prompts.y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((prompts.query[:, None] @ beta)[:, 0], prompts.target, atol=1e-5, rtol=1e-5)
    noisy = double(replace(world, noise=0.25, length=400).sample(500, 0))
    beta = torch.linalg.lstsq(noisy.x, noisy.y).solution
    residual = noisy.y - noisy.x @ beta
    assert residual.square().mean().item() == pytest.approx(0.25 * (400 - 4) / 400, rel=0.02)
    assert beta.square().mean().item() == pytest.approx(1 / 4, rel=0.1)


def test_without_noise_the_best_predictor_is_the_smallest_fit_even_of_few_pairs():
    world = LinearRegression(features=6, length=9, noise=0.0, min_length=2)
    prompts = double(world.sample(200, 0))
    best = world.best(prompts)
    torch.testing.assert_close(best, ridge(prompts, 1e-9), rtol=1e-4, atol=1e-5)
    enough = prompts.mask.sum(dim=1) >= 6
    assert 0 < int(enough.sum()) < 200
    torch.testing.assert_close(best[enough], prompts.target[enough], rtol=1e-3, atol=1e-3)


def test_inputs_have_the_stated_covariance():
    x = LinearRegression(features=3, length=50, covariance=COVARIANCE).sample(4000, 0).x.flatten(0, 1)
    torch.testing.assert_close(x.T.cov(), torch.tensor(COVARIANCE), atol=0.02, rtol=0)
    x = LinearRegression(features=3, length=50, covariance=(3.0, 1.0, 0.2)).sample(4000, 0).x.flatten(0, 1)
    torch.testing.assert_close(x.T.cov(), torch.tensor([3.0, 1.0, 0.2]).diag(), atol=0.03, rtol=0)


def test_a_task_reads_its_own_features_alone():
    world = LinearRegression(features=5, noise=0.0, supports=((0, 3), (1, 2, 4)))
    assert world.outputs == 2
    prompts = double(world.sample(40, 0))
    beta = torch.linalg.lstsq(prompts.x, prompts.y).solution
    assert beta[:, [1, 2, 4], 0].abs().max() < 1e-5
    assert beta[:, [0, 3], 1].abs().max() < 1e-5
    assert beta[:, [0, 3], 0].abs().min() > 1e-4


def test_same_seed_same_prompts_and_lengths_are_mixed():
    world = LinearRegression(min_length=3, length=9)
    one, same, other = world.sample(300, 4), world.sample(300, 4), world.sample(300, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one.x, other.x)
    assert sorted(set(one.mask.sum(dim=1).tolist())) == list(range(3, 10))
    assert bool((one.mask[:, 1:] <= one.mask[:, :-1]).all())


@pytest.mark.parametrize("outputs", [1, 3])
def test_predictors_prompt_by_prompt(outputs):
    prompts = double(LinearRegression(features=3, length=8, min_length=2, outputs=outputs).sample(20, 0))
    filled = prompts._replace(x=prompts.x.masked_fill(~prompts.mask[..., None], float("nan")))
    results = {
        "gd": gradient_step(filled, 0.7),
        "debiased": debiased_gradient_step(filled, 0.7),
        "preconditioned": debiased_gradient_step(filled, 1.0, torch.tensor(COVARIANCE)),
        "bayes": ridge(filled, 0.3),
        "least squares": least_squares(filled),
        "neighbours": nearest_neighbours(filled, 3),
    }
    for i, mask in enumerate(prompts.mask):
        x, y, q = prompts.x[i, mask], prompts.y[i, mask], prompts.query[i]
        centred = x - x.mean(dim=0)
        near = (x - q).norm(dim=1).argsort()[:3]
        expected = {
            "gd": 0.7 * sum(y[l] * (x[l] @ q) for l in range(len(x))) / len(x),
            "debiased": 0.7 * sum(y[l] * (centred[l] @ q) for l in range(len(x))) / len(x),
            "preconditioned": sum(y[l] * (centred[l] @ torch.tensor(COVARIANCE).double() @ q) for l in range(len(x)))
            / len(x),
            "bayes": q @ torch.linalg.inv(x.T @ x + 0.3 * torch.eye(3).double()) @ x.T @ y,
            "least squares": q @ torch.linalg.pinv(x) @ y,
            "neighbours": y[near].mean(dim=0),
        }
        for name, value in expected.items():
            torch.testing.assert_close(results[name][i], value, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_posterior_mean_is_beaten_by_none():
    for world in (
        LinearRegression(),
        LinearRegression(features=6, supports=((0, 1, 2), (3, 4, 5))),
        LinearRegression(features=3, covariance=COVARIANCE, min_length=2, length=12),
    ):
        prompts = world.sample(20_000, 0)
        best = (world.best(prompts) - prompts.target).square().mean()
        for other in (ridge(prompts, 0.02), ridge(prompts, 3.0), debiased_gradient_step(prompts, 0.8)):
            assert best < (other - prompts.target).square().mean()


def test_risks_of_any_step_are_exact():
    for length, step in ((6, 0.5), (20, 0.9)):
        world = LinearRegression(features=3, length=length, noise=0.3)
        prompts = world.sample(40_000, 1)

        def risk(prediction, target=prompts.target):
            return (prediction - target).square().mean().item()

        assert risk(gradient_step(prompts, step)) == pytest.approx(theory.plain_risk(3, length, 0.3, step), rel=0.04)
        debiased = theory.debiased_risk(3, length, 0.3, step)
        assert risk(debiased_gradient_step(prompts, step)) == pytest.approx(debiased, rel=0.04)


@pytest.mark.parametrize("kind", ["plain", "debiased"])
def test_the_best_step_is_the_minimum_and_its_risk_the_closed_form(kind):
    step, risk = getattr(theory, f"{kind}_step"), getattr(theory, f"{kind}_risk")
    best = step(5, 40, 0.1)
    assert risk(5, 40, 0.1) < min(risk(5, 40, 0.1, best - 0.01), risk(5, 40, 0.1, best + 0.01))
    own = 5 + 1 + 0.5
    rest = 40 + own if kind == "plain" else 40 + own - 1
    assert risk(5, 40, 0.1) == pytest.approx(0.1 + own / rest, rel=1e-12)


def test_heads_closed_forms_agree_with_each_other():
    g = 0.3
    step = theory.opposite_heads_step(g, 5, 40, 0.1)

    def loss(eta):
        mu = torch.tensor([eta / (2 * g), -eta / (2 * g)], dtype=torch.float64)
        return theory.reduced_risk(mu, torch.tensor([g, -g], dtype=torch.float64), 5, 40, 0.1).item()

    assert loss(step) < min(loss(step - 0.01), loss(step + 0.01))
    assert theory.opposite_heads_step(1e-4, 5, 40, 0.1) == pytest.approx(theory.debiased_step(5, 40, 0.1), rel=1e-6)
    assert theory.opposite_heads_step(0.0, 5, 40, 0.1) == theory.debiased_step(5, 40, 0.1)
    omega = torch.tensor([theory.one_head_scale(5)], dtype=torch.float64)
    effective = torch.e * 1.1 * 5 / 40
    mu = omega / (omega**2 * (1 + effective))
    assert theory.reduced_risk(mu, omega, 5, 40, 0.1).item() == pytest.approx(
        theory.one_head_risk(5, 40, 0.1), rel=1e-6
    )
    identity = theory.best_matrix(torch.eye(5, dtype=torch.float64), 40, 0.1)
    torch.testing.assert_close(identity, theory.debiased_step(5, 40, 0.1) * torch.eye(5, dtype=torch.float64))


def test_the_best_matrix_is_better_than_its_neighbours():
    world = LinearRegression(features=3, covariance=COVARIANCE, length=30)
    prompts, best = world.sample(40_000, 0), theory.best_matrix(world.sigma, 30, 0.1)

    def risk(matrix):
        return (debiased_gradient_step(prompts, 1.0, matrix) - prompts.target).square().mean().item()

    assert risk(best) < min(risk(0.85 * best), risk(1.15 * best), risk(best.diag().diag()), risk(best.mean() * best))


@pytest.mark.parametrize(
    "settings",
    [
        {"features": 0},
        {"length": 0},
        {"outputs": 0},
        {"noise": -0.1},
        {"noise": float("nan")},
        {"min_length": 0},
        {"min_length": 41},
        {"covariance": (1.0, 2.0)},
        {"features": 2, "covariance": ((1.0, 0.5), (0.4, 1.0))},
        {"features": 2, "covariance": ((1.0, 2.0), (2.0, 1.0))},
        {"features": 2, "covariance": (1.0, 0.0)},
        {"supports": ((0, 1), (1, 2))},
        {"supports": ((0, 1), ())},
        {"supports": ((0, 7),)},
        {"supports": ((0, 1), (2,)), "outputs": 3},
    ],
)
def test_bad_worlds(settings):
    with pytest.raises(ValueError, match=r"expected|must|cannot"):
        LinearRegression(**settings)


def test_bad_prompts_and_closed_forms():
    prompts = LinearRegression().sample(3, 0)
    with pytest.raises(ValueError, match="one label"):
        gradient_step(prompts._replace(y=prompts.y[:, :-1]))
    with pytest.raises(ValueError, match="at least one real pair"):
        ridge(prompts._replace(mask=torch.zeros_like(prompts.mask)), 0.5)
    with pytest.raises(ValueError, match="neighbour"):
        nearest_neighbours(prompts, 0)
    with pytest.raises(ValueError, match="at least one item"):
        LinearRegression().sample(0, 0)
    for function in (theory.debiased_step, theory.plain_step, theory.debiased_risk, theory.plain_risk):
        with pytest.raises(ValueError, match="length > 0"):
            function(5, 0, 0.1)
        with pytest.raises(ValueError, match="noise >= 0"):
            function(5, 4, -0.1)
    with pytest.raises(ValueError, match="length > 0"):
        theory.best_matrix(torch.eye(2), 0, 0.1)
    with pytest.raises(ValueError, match="length > 0"):
        theory.reduced_risk(torch.ones(2), torch.ones(2), 5, -1, 0.1)
