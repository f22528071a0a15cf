"""Losses between a student and its teacher, means over the real tokens. Arithmetic is float32."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Direction = Literal["reverse", "forward"]
"""``"reverse"`` is KL(student || teacher), ``"forward"`` KL(teacher || student)."""


def hidden_state_loss(
    student: Float[Tensor, "batch tokens dim"],
    teacher: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error over the entries of the real tokens."""
    return _mean((student.float() - teacher.float()).square().mean(dim=-1), mask)


def divergence_loss(
    student: Float[Tensor, "batch tokens vocabulary"],
    teacher: Float[Tensor, "batch tokens vocabulary"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    direction: Direction = "reverse",
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence in nats of the distributions that logits mean.

    Raises:
        ValueError: an unknown direction.
    """
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction must be 'reverse' or 'forward', got {direction!r}")
    ours, theirs = student.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    first, second = (ours, theirs) if direction == "reverse" else (theirs, ours)
    return _mean((first.exp() * (first - second)).sum(dim=-1), mask)


def hard_label_loss(
    student: Float[Tensor, "batch tokens vocabulary"],
    teacher: Float[Tensor, "batch tokens vocabulary"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy in nats of the student against the teacher's likeliest token."""
    losses = F.cross_entropy(student.float().flatten(0, 1), teacher.argmax(dim=-1).flatten(), reduction="none")
    return _mean(losses.view(student.shape[:2]), mask)


def _mean(values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None) -> Float[Tensor, ""]:
    if mask is None:
        return values.mean()
    if not bool(mask.any()):
        raise ValueError("the mask has no real token")
    return values.where(mask, 0.0).sum() / mask.sum()
