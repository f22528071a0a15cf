"""What a task means to a readout: its loss, its outputs, and a score that is a mean over items.

Every score is a mean of per-item scores, so that intervals and paired tests can resample items whatever the task:
accuracy (classification), label-ranking average precision (multi-label), R^2 (regression).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.types import Task


@dataclass(frozen=True)
class Objective:
    """Loss and score of one task.

    Attributes:
        task: which.
        outputs: width of a head.
        target_mean, target_std: standardisation of regression targets (0 and 1 otherwise).
    """

    task: Task
    outputs: int
    target_mean: float = 0.0
    target_std: float = 1.0

    @classmethod
    def of(cls, task: Task, classes: int, targets: Tensor) -> Objective:
        """The objective of a data set, from its training targets."""
        if task == "regression":
            std = float(targets.std()) if len(targets) > 1 else 0.0
            if not std > 0:
                raise ValueError("regression needs targets that vary, but all training targets are equal")
            return cls(task, 1, float(targets.mean()), std)
        return cls(task, classes)

    @property
    def metric(self) -> str:
        """Name of the score."""
        return {"classification": "accuracy", "multilabel": "label-ranking average precision", "regression": "R2"}[
            self.task
        ]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of each member: ``outputs`` ``(members, batch, outputs)`` to ``(members,)``."""
        members = outputs.shape[0]
        if self.task == "classification":
            flat = F.cross_entropy(outputs.flatten(0, 1), targets.repeat(members), reduction="none")
            return flat.view(members, -1).mean(dim=1)
        if self.task == "multilabel":
            wanted = targets.to(outputs.dtype).expand_as(outputs)
            return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(dim=(1, 2))
        wanted = (targets.to(outputs.dtype) - self.target_mean) / self.target_std
        return (outputs[..., 0] - wanted).square().mean(dim=1)

    def predictions(self, outputs: Tensor) -> np.ndarray:
        """Head outputs ``(..., outputs)`` to probabilities, or to values in the target's unit."""
        if self.task == "classification":
            return outputs.float().softmax(dim=-1).cpu().numpy()
        if self.task == "multilabel":
            return outputs.float().sigmoid().cpu().numpy()
        return (outputs.float() * self.target_std + self.target_mean).cpu().numpy()

    def item_scores(self, predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Per-item scores whose mean is the score: ``(..., items, outputs)`` to ``(..., items)``."""
        if self.task == "classification":
            return (predictions.argmax(axis=-1) == targets).astype(np.float64)
        if self.task == "multilabel":
            return ranking_precision(predictions, targets)
        variance = np.var(targets)
        return 1.0 - (predictions[..., 0] - targets) ** 2 / (variance if variance > 0 else 1.0)


def ranking_precision(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Label-ranking average precision of each item: mean over its labels of the precision at the label's rank.

    1 for an item without labels (or with all). Mean over items equals scikit-learn's
    ``label_ranking_average_precision_score``.
    """
    true = np.broadcast_to(targets.astype(bool), predictions.shape)
    above = predictions[..., None, :] >= predictions[..., :, None]
    rank = above.sum(axis=-1)
    hits = (above & true[..., None, :]).sum(axis=-1)
    count = true.sum(axis=-1)
    precision = np.where(true, hits / rank, 0.0).sum(axis=-1) / np.maximum(count, 1)
    return np.where((count == 0) | (count == true.shape[-1]), 1.0, precision)


def to_device_targets(targets: Tensor, task: Task) -> Tensor:
    """Targets in the dtype the losses take."""
    return targets.long() if task == "classification" else targets.to(torch.float32)
