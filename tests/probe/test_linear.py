"""Converged linear models against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from cenote.probe.linear import fit_linear
from cenote.probe.tasks import Objective


@pytest.fixture
def blobs():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 6))
    labels = generator.integers(0, 3, 240)
    x = centres[labels] * 1.2 + generator.normal(size=(240, 6)) * 1.5 + 5.0
    x[:, 2] *= 100.0
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def test_logistic_regression_is_the_exact_optimum(blobs):
    x, y = blobs
    fit = fit_linear(x[:160], y[:160], x[160:], y[160:], Objective("classification", 3), penalties=(1e-2,))
    standard = ((x - fit.mean) / fit.std).numpy()
    reference = LogisticRegression(C=1 / (1e-2 * 160), tol=1e-8, max_iter=5000).fit(standard[:160], y[:160].numpy())
    ours = torch.softmax(fit(x), dim=1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(standard), atol=2e-3)
    assert fit.converged


def test_ridge_is_the_closed_form(blobs):
    x, _ = blobs
    y = x[:, 0] * 2 - x[:, 2] / 50 + torch.randn(len(x), generator=torch.Generator().manual_seed(0)) + 30
    objective = Objective.of("regression", 0, y[:160])
    fit = fit_linear(x[:160], y[:160], x[160:], y[160:], objective, penalties=(0.1,))
    standard = ((x - fit.mean) / fit.std).numpy()
    reference = Ridge(alpha=0.1 * 160).fit(
        standard[:160], ((y[:160] - objective.target_mean) / objective.target_std).numpy()
    )
    np.testing.assert_allclose(fit(x)[:, 0].numpy(), reference.predict(standard), atol=1e-4)


def test_penalty_is_chosen_on_validation(blobs):
    x, y = blobs
    objective = Objective("classification", 3)
    fits = {p: fit_linear(x[:160], y[:160], x[160:], y[160:], objective, penalties=(p,)) for p in (10.0, 1e-1, 1e-3)}
    path = fit_linear(x[:160], y[:160], x[160:], y[160:], objective, penalties=tuple(fits))
    assert path.validation == max(f.validation for f in fits.values())


def test_constant_feature_and_bad_input(blobs):
    x, y = blobs
    x = torch.cat([x, torch.full((len(x), 1), 7.0)], dim=1)
    fit = fit_linear(x[:160], y[:160], x[160:], y[160:], Objective("classification", 3))
    assert torch.isfinite(fit(x)).all()
    with pytest.raises(ValueError, match="empty training set"):
        fit_linear(x[:0], y[:0], x, y, Objective("classification", 3))
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        fit_linear(x, y, x, y, Objective("classification", 3))
