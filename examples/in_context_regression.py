"""Watch attention become gradient descent: train four heads on random regressions and read their weights."""

import torch

from cenote.worlds.linear_regression import LinearRegression, debiased_gradient_step
from cenote.worlds.linear_regression_theory import debiased_step
from cenote.worlds.regression_attention import RegressionAttention, fit_regression
from cenote.worlds.regression_reduction import reduce_heads

world = LinearRegression(features=3, length=40, noise=0.1)
model = fit_regression(RegressionAttention(3, heads=4, seeds=(0,)), world, steps=1500, batch=128, lr=1e-2)

heads = reduce_heads(model.circuits, features=3)
for omega, mu, energy in zip(heads.omega[0, :, 0], heads.mu[0, :, 0], heads.diagonal_energy[0], strict=True):
    print(f"KQ = {omega:+.3f} I (diagonal energy {energy:.3f}), OV = {mu:+.3f} on the label")
theory = debiased_step(features=3, length=40, noise=0.1)
print(f"effective step {heads.step.item():.3f}, theory {theory:.3f}")

test = world.sample(20_000, seed=1)
with torch.no_grad():
    trained = model(type(test)(*(part[None] for part in test)))[0]
for name, answer in (
    ("trained heads", trained),
    ("debiased step", debiased_gradient_step(test, theory)),
    ("Bayes", world.best(test)),
):
    print(f"{name:14} mean squared error {(answer - test.target).square().mean():.3f}")
