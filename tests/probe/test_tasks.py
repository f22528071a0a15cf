"""Losses and scores against torch and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import label_ranking_average_precision_score, r2_score

from cenote.probe.tasks import Objective


def test_losses_are_per_member_means():
    outputs = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    losses = Objective("classification", 5).loss(outputs, labels)
    torch.testing.assert_close(losses, torch.stack([F.cross_entropy(o, labels) for o in outputs]))
    wanted = (torch.rand(8, 5, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    losses = Objective("multilabel", 5).loss(outputs, wanted)
    torch.testing.assert_close(losses, torch.stack([F.binary_cross_entropy_with_logits(o, wanted) for o in outputs]))
    values = torch.linspace(10, 20, 8)
    objective = Objective.of("regression", 0, values)
    losses = objective.loss(outputs[..., :1], values)
    torch.testing.assert_close(
        losses, torch.stack([F.mse_loss(o[:, 0], (values - 15) / values.std()) for o in outputs])
    )


def test_scores_equal_scikit_learn():
    generator = np.random.default_rng(0)
    predictions = generator.random((2, 40, 6)).round(1)
    targets = generator.random((40, 6)) > 0.6
    ours = Objective("multilabel", 6).item_scores(predictions, targets).mean(axis=-1)
    expected = [label_ranking_average_precision_score(targets, p) for p in predictions]
    np.testing.assert_allclose(ours, expected)
    values = generator.normal(size=40)
    guesses = generator.normal(size=(2, 40, 1))
    ours = Objective("regression", 1).item_scores(guesses, values).mean(axis=-1)
    np.testing.assert_allclose(ours, [r2_score(values, g[:, 0]) for g in guesses])


def test_constant_regression_targets_are_refused():
    with pytest.raises(ValueError, match="all training targets are equal"):
        Objective.of("regression", 0, torch.ones(5))
