"""The setting of the in-context regression reproduction, and risks in it."""

from __future__ import annotations

import torch
from torch import Tensor

from cenote.worlds.linear_regression import LinearRegression, Prompts
from cenote.worlds.regression_attention import RegressionAttention

WORLD = LinearRegression()
OUR_BOUND = "The specification gives no bound; ours."


@torch.no_grad()
def model_risks(model: RegressionAttention, test: Prompts, part: int = 5000) -> list[float]:
    """Mean squared error of each run on the same prompts."""
    runs = len(model.key)
    errors = [
        (model(Prompts(*(each.expand(runs, *each.shape) for each in piece))) - piece[3]).square().mean(dim=2)
        for piece in zip(*(each.split(part) for each in test), strict=True)
    ]
    return torch.cat(errors, dim=1).double().mean(dim=1).tolist()


def risk_of(prediction: Tensor, test: Prompts) -> float:
    """Mean squared error against the noisy label."""
    return float((prediction - test.target).double().square().mean())
