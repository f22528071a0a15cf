"""What holds of in-context regression by attention whatever the training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.worlds.linear_regression import LinearRegression, Prompts, debiased_gradient_step, gradient_step
from cenote.worlds.linear_regression_theory import debiased_risk, debiased_step, plain_risk, plain_step
from cenote.worlds.regression_attention import RegressionAttention, reduced_prediction


def exact_findings() -> list[Finding]:
    """The reference file, the reduction, the invariances, the limit of small scales, the two exact risks."""
    # No official code could be found: the reference file was made by another implementation of the same formulas.
    claim = "All outputs of the reference file made by an independent implementation are met."
    golden = [replace(each, claim=claim) for each in golden_findings("icl-linear-regression")]
    return [*golden, *_reduction(), *_invariances(), *_limit(), *_risks()]


def planted_heads(omega: list[float], mu: list[float], features: int) -> RegressionAttention:
    """Heads with ``KQ = omega I`` on x and ``OV = mu`` on y, in double precision."""
    model = RegressionAttention(features, len(omega)).double()
    on_x = torch.eye(features + 1, dtype=torch.float64)
    on_x[-1, -1] = 0
    on_y = torch.eye(features + 1, dtype=torch.float64) - on_x
    with torch.no_grad():
        model.key.copy_(on_x.expand_as(model.key))
        model.query.copy_(torch.tensor(omega, dtype=torch.float64)[:, None, None] * on_x)
        model.output.copy_(on_y.expand_as(model.output))
        model.value.copy_(torch.tensor(mu, dtype=torch.float64)[:, None, None] * on_y)
    return model


def _prompts(size: int, **settings: int) -> Prompts:
    return Prompts(*(p if p.dtype == torch.bool else p.double() for p in LinearRegression(**settings).sample(size, 0)))  # type: ignore[arg-type]


@torch.no_grad()
def _reduction() -> list[Finding]:
    omega, mu = [0.3, -0.2, 0.1], [1.5, -2.0, 0.4]
    prompts = _prompts(200, min_length=3)
    away = planted_heads(omega, mu, 5)(prompts) - reduced_prediction(
        torch.tensor(omega, dtype=torch.float64), torch.tensor(mu, dtype=torch.float64), prompts
    )
    return [at_most("Heads of the emergent form are their two numbers.", _largest(away), 1e-6)]


@torch.no_grad()
def _invariances() -> list[Finding]:
    prompts = _prompts(200)
    raised = prompts._replace(y=prompts.y + 3)
    balanced, single = planted_heads([0.2, -0.2], [2.0, -2.0], 5), planted_heads([0.2], [2.0], 5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    mixed = prompts._replace(x=prompts.x[:, order], y=prompts.y[:, order])
    more = Prompts(
        torch.cat([prompts.x, torch.full((200, 7, 5), 9.0).double()], dim=1),
        torch.cat([prompts.y, torch.full((200, 7, 1), -9.0).double()], dim=1),
        prompts.query,
        prompts.target,
        torch.cat([prompts.mask, torch.zeros(200, 7, dtype=torch.bool)], dim=1),
    )
    plain = balanced(prompts)
    moved = single(raised) - single(prompts)
    return [
        at_most(
            "With mu summing to 0, a constant added to all labels changes nothing.",
            _largest(balanced(raised) - plain),
            1e-6,
        ),
        finding(
            "With a single head it moves the prediction.",
            "above 1 (mu times the constant, 6)",
            float(moved.min()),
            lambda v: v > 1,
            unit="prediction",
        ),
        at_most("The order of the pairs changes nothing.", _largest(balanced(mixed) - plain), 1e-6),
        at_most("Masked pairs change nothing.", _largest(balanced(more) - plain), 1e-6),
    ]


@torch.no_grad()
def _limit() -> list[Finding]:
    prompts, eta = _prompts(500), debiased_step(5, 40, 0.1)
    scale = 1e-3
    small = planted_heads([scale, -scale], [eta / (2 * scale), -eta / (2 * scale)], 5)(prompts)
    step = debiased_gradient_step(prompts, eta)
    away = float((small - step).norm() / step.norm())
    claim = "Two opposite heads of scale 0.001 are the debiased gradient step."
    return [at_most(claim, away, 1e-3, "relative difference")]


@torch.no_grad()
def _risks() -> list[Finding]:
    world = LinearRegression()
    found = []
    for length in (10, 40):
        prompts = replace(world, length=length).sample(40_000, 3)
        for name, step, best, risk in (
            ("debiased", debiased_gradient_step, debiased_step, debiased_risk),
            ("plain", gradient_step, plain_step, plain_risk),
        ):
            measured = float((step(prompts, best(5, length, 0.1)) - prompts.target).square().mean())
            away = 100 * abs(measured / risk(5, length, 0.1) - 1)
            claim = f"The {name} gradient step's risk at {length} pairs is the closed form's."
            found.append(at_most(claim, away, 4, "% away (40 000 prompts)"))
    return found


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
