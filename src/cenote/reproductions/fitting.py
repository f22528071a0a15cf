"""Heads on tokens that are already in memory: what the reproductions of poolings measure with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cenote.pooling.base import Pooling
from cenote.probe.feed import Feed
from cenote.probe.heads import Member
from cenote.probe.linear import PENALTIES, fit_linear
from cenote.probe.plan import Candidate
from cenote.probe.tasks import Objective
from cenote.probe.train import Group, Schedule, train_groups
from cenote.types import Features


class Labelled(NamedTuple):
    """Tokens ``(items, tokens, dim)`` and the class of each item."""

    tokens: Tensor
    targets: Tensor


class Parts(NamedTuple):
    """A data set whose settings are chosen on ``validation`` and whose test part is looked at once."""

    train: Labelled
    validation: Labelled
    test: Labelled

    def read(self, tokens: Callable[[Tensor], Tensor]) -> Parts:
        """The same items with other tokens, ``tokens(old)``."""
        return Parts(*(Labelled(tokens(part.tokens), part.targets) for part in self))


class HeldFeed(Feed):
    """Tokens in memory as the trainer takes them."""

    def __init__(self, part: Labelled) -> None:
        count, tokens, _ = part.tokens.shape
        self.targets, self.device = part.targets, "cpu"
        self.held = Features(part.tokens.unsqueeze(1), torch.ones(count, tokens, dtype=torch.bool), (0,))

    def __len__(self) -> int:
        return len(self.targets)


def converged_accuracy(parts: Parts, pool: Callable[[Tensor], Tensor], penalties: Sequence[float] = PENALTIES) -> float:
    """Test accuracy in per cent of a converged logistic regression on ``pool(tokens)``, penalty chosen on validation.

    Raises:
        RuntimeError: the chosen fit did not converge.
    """
    with torch.no_grad():
        train, validation, test = (pool(part.tokens) for part in parts)
    objective = Objective("classification", int(parts.train.targets.max()) + 1)
    fit = fit_linear(
        train, parts.train.targets, validation, parts.validation.targets, objective, penalties, max_iter=5000
    )
    if not fit.converged:
        raise RuntimeError(f"the linear probe did not converge at penalty {fit.penalty}")
    return _per_cent(fit(test), parts.test.targets)


@dataclass(frozen=True)
class Trained:
    """Readouts of one kind, one a seed, at the settings that did best on validation.

    Attributes:
        accuracies: on the test part, in per cent.
        poolings: the trained modules.
        lr, query_factor: the chosen rate, and the factor of the learned queries' rate.
    """

    accuracies: tuple[float, ...]
    poolings: tuple[Pooling, ...]
    lr: float
    query_factor: float


def trained_accuracy(
    parts: Parts,
    readout: str,
    *,
    lrs: Sequence[float],
    query_factors: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0,),
    epochs: int = 60,
    batch_size: int = 64,
    rate_factors: Mapping[str, float] | None = None,
    **options: Any,
) -> Trained:
    """Train pooling, batch norm and linear layer for every rate, factor and seed together.

    Args:
        parts: the data.
        readout: name of a pooling.
        lrs, query_factors: the grid; the pair with the best mean validation accuracy over seeds is tested.
        seeds: initialisations.
        epochs: passes; the rate falls to zero by a cosine.
        batch_size: items a step.
        rate_factors: further factors on the rate, by the name of the pooling's parameter.
        **options: of the pooling.
    """
    members = tuple(Member(lr, factor, seed) for lr in lrs for factor in query_factors for seed in seeds)
    candidate = Candidate(readout, (0,), "both", tuple(sorted(options.items())), members)
    objective = Objective("classification", int(parts.train.targets.max()) + 1)
    schedule = Schedule(epochs, warmup=0.1 * epochs, batch_size=batch_size)
    group = Group.create(candidate, parts.train.tokens.shape[-1], objective, schedule, uniform=True)
    for name, factor in (rate_factors or {}).items():
        group.optimizer.factors[f"pooling.{name}"] = torch.full((len(members),), factor)
    train, validation, test = map(HeldFeed, parts)
    train_groups([group], [train], validation, schedule)
    winners = group.winners()
    chosen = group.stack.members[winners[0]]
    group.stack.load(group.best)
    outputs, targets = group.outputs(test.batches(512))
    return Trained(
        tuple(_per_cent(outputs[i], targets) for i in winners),
        tuple(group.stack.member(group.best, i)[0] for i in winners),
        chosen.lr,
        chosen.query_factor,
    )


def _per_cent(outputs: Tensor, targets: Tensor) -> float:
    return 100 * (outputs.argmax(dim=-1) == targets).double().mean().item()
