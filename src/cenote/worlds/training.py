"""Training of small networks on worlds of symbols, in seconds to minutes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.worlds.base import IGNORE, Sequences, World


def fit_sequences(
    model: nn.Module,
    world: World[Sequences],
    steps: int,
    *,
    batch: int = 64,
    lr: float = 1e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    forward: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train by cross-entropy on fresh batches with AdamW, a linear warm-up and a cosine to 0.

    Args:
        model: symbols to logits ``(batch, tokens, classes)``.
        steps: updates, one fresh batch each.
        warmup: share of the steps in which the rate grows.
        clip: largest norm of the gradient.
        seed: of the batches; the model's start is the caller's.
        forward: calls the model where symbols alone do not do.
        watch: told step and loss after every update.

    Raises:
        FloatingPointError: loss or gradient are no longer finite.
    """
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    rising = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for step, examples in zip(range(steps), world.stream(batch, seed), strict=False):
        logits = (forward or model)(examples.inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), examples.targets.flatten(), ignore_index=IGNORE)
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if not bool(loss.isfinite() & norm.isfinite()):
            raise FloatingPointError(
                f"training diverged at step {step}: loss {loss.item():g}, gradient {norm.item():g}"
            )
        optimiser.step()
        schedule.step()
        if watch is not None:
            watch(step, loss.item())
    return model.eval()


@torch.no_grad()
def sequence_accuracy(
    model: Callable[[Tensor], Tensor], world: World[Sequences], items: int = 1000, seed: int = 1_000_000
) -> float:
    """Share of the asked positions that the model answers right, on a batch that training never saw."""
    examples = world.sample(items, seed)
    answers = torch.cat([model(part).argmax(dim=-1) for part in examples.inputs.split(250)])
    asked = examples.targets != IGNORE
    return (answers == examples.targets)[asked].double().mean().item()
