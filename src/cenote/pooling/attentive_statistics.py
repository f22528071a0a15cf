"""Attentive statistics pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cenote.ops.masked import masked_softmax
from cenote.ops.statistics import weighted_statistics
from cenote.pooling.base import Pooling


class AttentiveStatistics(Pooling):
    """Attention-weighted mean and standard deviation, side by side.

    ``e_n = v^T tanh(W x_n + b)``, ``a = softmax(e)``, ``mu = sum_n a_n x_n``,
    ``sigma = sqrt(max(sum_n a_n (x_n - mu)^2, variance_floor))``, ``out = [mu, sigma]`` ``(batch, 2 dim)``. Source:
    "Attentive Statistics Pooling for Deep Speaker Embedding" (arXiv 1803.10963). Parameters:
    ``hidden_dim * (dim + 2)``. The variance is taken about the mean rather than as a difference of second moments,
    which cancels in single precision, and the paper's additive constant of the score is left out: softmax ignores it.

    Args:
        dim: token width.
        hidden_dim: width of the scoring layer.
        variance_floor: smallest variance; keeps the gradient finite for one token or equal ones.
    """

    name = "attentive_statistics"
    attends = True

    def __init__(self, dim: int, hidden_dim: int = 128, variance_floor: float = 1e-6) -> None:
        super().__init__(dim, 2 * dim)
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        if not variance_floor > 0:
            raise ValueError(f"variance_floor must be positive, got {variance_floor}")
        self.variance_floor = variance_floor
        self.hidden = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1, bias=False)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = self.score(self.hidden(tokens).tanh())
        weights = masked_softmax(scores.transpose(1, 2), mask)
        mean, deviation = weighted_statistics(tokens, weights.transpose(1, 2), mask, self.variance_floor)
        return torch.cat([mean, deviation], dim=-1), weights
