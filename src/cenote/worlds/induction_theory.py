"""Reduced models of the abrupt transition: the phenomenological loss and the minimal induction head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.worlds.context_classification import ContextClassification


class PhenomenologicalLoss(NamedTuple):
    """Loss and its derivatives at (b, a, xi)."""

    loss: float
    db: float
    da: float
    dxi: float


def phenomenological_loss(b: float, a: float, xi: float, pairs: int, labels: int) -> PhenomenologicalLoss:
    """Three nested logits: attention of labels to their items, of the target to labels, and trust in what it reads.

    ``w = e^b / (e^b + N)``, ``q+ = e^(a w) / (e^(a w) + 2N)``, ``qo = 1 / (e^(a w) + 2N)`` and

        ``loss = -log(e^(xi q+) / (e^(xi q+) + (N - 1) e^(xi qo) + L - N))``

    for N pairs of different classes and L labels. At the origin the derivative by xi is ``-(L - N) / (L (2N + 1))``,
    the others 0: it is a critical point exactly when L = N. Reconstructed from the predictions of "The
    mechanistic basis of data dependence and abrupt learning in an in-context classification task" (arXiv 2312.03002).

    Raises:
        ValueError: fewer than one pair, or fewer labels than pairs.
    """
    if pairs < 1 or labels < pairs:
        raise ValueError(f"expected at least one pair and as many labels as pairs, got {pairs} and {labels}")
    w = 1 / (1 + pairs * math.exp(-b))
    spread = 2 * pairs * math.exp(-a * w)
    plus, other = 1 / (1 + spread), math.exp(-a * w) / (1 + spread)
    # Everything relative to the right label's e^(xi q+).
    wrong = (pairs - 1) * math.exp(xi * (other - plus))
    total = 1 + wrong + (labels - pairs) * math.exp(-xi * plus)
    right, wrong = 1 / total, wrong / total
    slope = xi * ((right - 1) * plus * (1 - plus) - wrong * other * plus)  # by a w
    return PhenomenologicalLoss(math.log(total), slope * a * w * (1 - w), slope * w, (right - 1) * plus + wrong * other)


@dataclass(frozen=True)
class Descent:
    """Gradient descent on the phenomenological loss.

    Attributes:
        times: ``steps * step``, ``(steps,)``.
        losses: ``(steps,)``.
        states: b, a and xi, ``(steps, 3)``.
    """

    times: Float[np.ndarray, "steps"]
    losses: Float[np.ndarray, "steps"]
    states: Float[np.ndarray, "steps 3"]

    def first_below(self, loss: float) -> float:
        """Time at which the loss is first below a value; infinity if never."""
        (there,) = np.nonzero(self.losses < loss)
        return float(self.times[there[0]]) if len(there) else math.inf


def descend(
    pairs: int, labels: int, time: float = 300.0, step: float = 0.5, start: Sequence[float] = (0.0, 0.0, 0.0)
) -> Descent:
    """Euler's steps down the gradient of :func:`phenomenological_loss` from (b, a, xi), by default from the origin."""
    if not (step > 0 and time >= 0):
        raise ValueError(f"expected step > 0 and time >= 0, got {step} and {time}")
    b, a, xi = start
    losses, states = [], []
    count = round(time / step) + 1
    for _ in range(count):
        at = phenomenological_loss(b, a, xi, pairs, labels)
        losses.append(at.loss)
        states.append((b, a, xi))
        b, a, xi = b - step * at.db, a - step * at.da, xi - step * at.dxi
    return Descent(step * np.arange(count), np.array(losses), np.array(states))


@dataclass(frozen=True)
class PhenomenologicalFit:
    """The phenomenological model laid over a measured curve.

    Attributes:
        steps_per_time: optimiser steps that one unit of the model's time stands for.
        start: b, a and xi at step 0.
        predicted: the model's loss at the measured steps.
        misfit: root of the mean squared difference, in nats.
        explained: share of the measured variance, ``1 - misfit^2 / variance``.
        worst: largest difference, in nats.
    """

    steps_per_time: float
    start: tuple[float, float, float]
    predicted: Float[np.ndarray, "evaluations"]
    misfit: float
    explained: float
    worst: float


def fit_phenomenological(
    steps: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    pairs: int,
    labels: int,
    *,
    fit_start: bool = True,
    step: float = 0.5,
) -> PhenomenologicalFit:
    """Least squares of a measured loss over the scale of time and, with ``fit_start``, over b, a and xi at step 0.

    The model's loss begins near ``log L`` and ends at 0 whatever the fit; the scale alone fixes how steep the fall is
    beside how late it comes, which is what the measured curve can contradict. Searched by Nelder and Mead from two
    starts, each at the best of several scales; deterministic.

    Raises:
        ValueError: fewer than five losses, or not one a step.
    """
    from scipy.optimize import minimize

    wanted_steps, wanted = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if wanted.shape != wanted_steps.shape or wanted.ndim != 1 or len(wanted) < 5:
        raise ValueError(f"expected at least five losses, one a step, got {wanted.shape} for {wanted_steps.shape}")
    last = wanted_steps.max()

    def predict(setting: np.ndarray) -> np.ndarray:
        scale = math.exp(min(max(setting[0], -20.0), 20.0))
        start = tuple(np.clip(setting[1:], -10, 10)) if fit_start else (0.0, 0.0, 0.0)
        # Scales of which the measured span is thousands of units are no fit; they are cut off instead of followed.
        way = descend(pairs, labels, min(last / scale, 600.0) + step, step, start)
        return np.interp(wanted_steps / scale, way.times, way.losses)

    def misfit(setting: np.ndarray) -> float:
        return float(np.square(predict(setting) - wanted).mean())

    starts = [[0.0, 0.0, 0.0], [1.0, -1.0, 3.0]] if fit_start else [[]]
    # The fall of the measured curve is laid on the model's, then somewhat faster and slower.
    origin = descend(pairs, labels, 600.0, step)
    fall = origin.first_below(math.log(labels) / 2)
    measured = wanted_steps[np.argmin(np.abs(wanted - math.log(labels) / 2))]
    centre = math.log(max(measured, 1.0) / fall) if math.isfinite(fall) else math.log(max(last, 1.0) / 100)
    found = []
    for start in starts:
        first = min((np.array([centre + shift, *start]) for shift in np.linspace(-1, 1, 9)), key=misfit)
        simplex = np.vstack([first, first + np.diag([0.3] + [0.5] * len(start))])
        found.append(minimize(misfit, first, method="Nelder-Mead", options={"initial_simplex": simplex}))
    best = min(found, key=lambda each: each.fun).x
    predicted = predict(best)
    away = predicted - wanted
    b, a, xi = (float(v) for v in np.clip(best[1:], -10, 10)) if fit_start else (0.0, 0.0, 0.0)
    return PhenomenologicalFit(
        math.exp(best[0]),
        (b, a, xi),
        predicted,
        float(np.sqrt(np.square(away).mean())),
        float(1 - np.square(away).mean() / wanted.var()),
        float(np.abs(away).max()),
    )


class MinimalInductionHead(nn.Module):
    """The induction head with three numbers left: ``beta_1``, ``beta_2`` and ``alpha``, and a linear classifier.

    Token i keeps in a buffer ``u_i = sum_j p_ij x_j`` with ``p_ij ~ exp(beta_1 [j = i - 1])`` over ``j <= i``. The
    target attends to token j by ``exp(alpha <x_target, u_j> + beta_2 [j is a label])`` and the logits are linear in
    what it reads. ``train_label_bias=False`` holds ``beta_2`` at 0: the model of two numbers. Reconstructed from
    descriptions of "The mechanistic basis of data dependence and abrupt learning in an in-context classification task"
    (arXiv 2312.03002).
    """

    def __init__(self, world: ContextClassification, train_label_bias: bool = True) -> None:
        super().__init__()
        self.positions = world.positions
        self.previous, self.match = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.label = nn.Parameter(torch.zeros(()), requires_grad=train_label_bias)
        self.readout = nn.Linear(world.dim, world.num_labels, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(self, inputs: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch labels"]:
        """Logits of the target's label."""
        content = inputs[..., self.positions :]
        tokens = content.shape[1]
        place = torch.arange(tokens, device=inputs.device)
        scores = self.previous * (place[:, None] - 1 == place)
        buffer = scores.masked_fill(place > place[:, None], float("-inf")).softmax(dim=1) @ content
        match = self.match * (buffer @ content[:, -1, :, None]).squeeze(-1)
        weights = (match + self.label * (place % 2 == 1)).softmax(dim=1)
        return self.readout((weights[:, None] @ content).squeeze(1))
