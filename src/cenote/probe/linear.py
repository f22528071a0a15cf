"""Converged linear models on fixed vectors: the exact answer for readouts without parameters, and the linear reference.

Features are standardised with training statistics. Classification and multi-label minimise
``mean loss + penalty / 2 |W|^2`` by L-BFGS along a path of penalties, each warm-started from the stronger one;
regression is ridge, solved in closed form for the whole path. The penalty is chosen on the validation part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from cenote.probe.tasks import Objective

PENALTIES = tuple(10.0**-k for k in range(0, 6))
CHUNK = 8192


@dataclass(frozen=True)
class LinearFit:
    """A linear model on standardised features: ``W (x - mean) / std + b``.

    Attributes:
        weight: ``(outputs, width)``.
        bias: ``(outputs,)``.
        mean, std: ``(width,)`` of the training vectors.
        penalty: the chosen L2 penalty.
        validation: validation score.
        converged: whether L-BFGS met its tolerance within its iterations.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    penalty: float
    validation: float
    converged: bool

    def __call__(self, vectors: Tensor) -> Tensor:
        """Outputs ``(items, outputs)``."""
        return ((vectors - self.mean) / self.std) @ self.weight.T + self.bias


def fit_linear(
    train: Tensor,
    train_targets: Tensor,
    validation: Tensor,
    validation_targets: Tensor,
    objective: Objective,
    penalties: Sequence[float] = PENALTIES,
    max_iter: int = 500,
    stop: Callable[[], bool] = lambda: False,
) -> LinearFit:
    """Fit the path on ``train`` ``(items, width)`` and keep the penalty that scores best on ``validation``.

    Raises:
        ValueError: empty training set, or vectors that are not finite.
    """
    if len(train) == 0:
        raise ValueError("cannot fit a linear model on an empty training set")
    mean, std = _statistics(train)
    if not torch.isfinite(mean).all():
        raise ValueError("cannot fit a linear model: the training vectors are not all finite")
    solve = _ridge_path if objective.task == "regression" else _logistic_path
    best: LinearFit | None = None
    standard = (validation.float() - mean) / std
    for penalty, weight, bias, converged in solve(train, train_targets, mean, std, objective, penalties, max_iter):
        predictions = objective.predictions(standard @ weight.T + bias)
        score = float(objective.item_scores(predictions, validation_targets.numpy()).mean())
        if best is None or score > best.validation:
            best = LinearFit(weight, bias, mean, std, penalty, score, converged)
        if stop():
            break
    assert best is not None
    return best


def _chunks(vectors: Tensor):
    for start in range(0, len(vectors), CHUNK):
        yield start, vectors[start : start + CHUNK].float()


def _statistics(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in chunks; a constant feature gets standard deviation 1."""
    total = sum(chunk.double().sum(dim=0) for _, chunk in _chunks(vectors))
    mean = total / len(vectors)
    squares = sum((chunk.double() - mean).square().sum(dim=0) for _, chunk in _chunks(vectors))
    std = (squares / len(vectors)).sqrt()
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.ones_like(std))
    return mean.float(), std.float()


def _logistic_path(train, targets, mean, std, objective: Objective, penalties, max_iter):
    outputs, width, items = objective.outputs, train.shape[1], len(train)

    def value_and_gradient(flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        matrix = torch.from_numpy(flat).float().view(outputs, width + 1)
        weight, bias = matrix[:, :width], matrix[:, width]
        loss, gradient = 0.0, torch.zeros_like(matrix)
        for start, chunk in _chunks(train):
            x = (chunk - mean) / std
            wanted = targets[start : start + len(x)]
            scores = x @ weight.T + bias
            if objective.task == "classification":
                loss += float(F.cross_entropy(scores, wanted, reduction="sum"))
                error = scores.softmax(dim=1)
                error[torch.arange(len(x)), wanted] -= 1
            else:
                loss += float(F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")) / outputs
                error = (scores.sigmoid() - wanted) / outputs
            gradient[:, :width] += error.T @ x
            gradient[:, width] += error.sum(dim=0)
        gradient /= items
        gradient[:, :width] += penalty * weight
        loss = loss / items + 0.5 * penalty * float(weight.square().sum())
        return loss, gradient.double().flatten().numpy()

    flat = np.zeros(outputs * (width + 1))
    for penalty in sorted(penalties, reverse=True):
        options = {"maxiter": max_iter, "maxcor": 20, "gtol": 1e-4, "ftol": 1e-8}
        solution = minimize(value_and_gradient, flat, args=(penalty,), jac=True, method="L-BFGS-B", options=options)
        flat = solution.x
        matrix = torch.from_numpy(flat.copy()).float().view(outputs, width + 1)
        yield penalty, matrix[:, :width].contiguous(), matrix[:, width].contiguous(), bool(solution.success)


def _ridge_path(train, targets, mean, std, objective: Objective, penalties, max_iter):
    wanted = (targets.double() - objective.target_mean) / objective.target_std
    gram = torch.zeros(train.shape[1], train.shape[1], dtype=torch.float64)
    moment = torch.zeros(train.shape[1], dtype=torch.float64)
    for start, chunk in _chunks(train):
        x = ((chunk - mean) / std).double()
        gram += x.T @ x
        moment += x.T @ wanted[start : start + len(x)]
    values, vectors = torch.linalg.eigh(gram / len(train))
    rotated = vectors.T @ (moment / len(train))
    for penalty in sorted(penalties, reverse=True):
        weight = vectors @ (rotated / (values.clamp(min=0) + penalty))
        yield penalty, weight.float()[None], torch.zeros(1), True
