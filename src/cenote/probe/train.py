"""Training every readout x learning rate x seed together: each batch is read once and feeds all heads."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cenote.files import write_whole
from cenote.probe.feed import Feed
from cenote.probe.heads import StackedReadout
from cenote.probe.optim import OPTIMIZERS, warmup_cosine
from cenote.probe.outcome import Outcome
from cenote.probe.parallel import side_by_side
from cenote.probe.plan import Candidate
from cenote.probe.tasks import Objective
from cenote.types import Features

SCORED = 64
"""Items scored at a time: members make intermediate results large, and small ones stay in the processor's cache."""


@dataclass(frozen=True)
class Schedule:
    """How long and how to train.

    Attributes:
        epochs: passes over the training part.
        warmup: linear warm-up, in epochs.
        batch_size: items a step.
        patience: epochs without a better validation score after which a readout stops; ``None`` never.
        prune_at: fractions of the schedule at which the weaker half of the learning rates is dropped.
        optimizer: ``adamw``, ``sgd`` or ``lars``.
        weight_decay: decay of weight matrices.
        order_seed: seed of the batch order, which all members share.
    """

    epochs: int
    warmup: float
    batch_size: int = 64
    patience: int | None = None
    prune_at: tuple[float, ...] = (0.25, 0.5)
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    order_seed: int = 0

    @classmethod
    def sized(cls, items: int, epochs: int | None = None, batch_size: int | None = None, **rest: Any) -> Schedule:
        """For a training part of ``items``: 32 to 256 a step and enough epochs for about 500 steps, between 8 and 60,
        where they are not given."""
        batch_size = batch_size or int(np.clip(2 ** round(math.log2(max(items / 24, 1))), 32, 256))
        epochs = epochs or int(np.clip(math.ceil(500 / math.ceil(items / batch_size)), 8, 60))
        return cls(epochs, min(max(1.0, 0.1 * epochs), epochs / 2), batch_size, **rest)


def select_tokens(features: Features, candidate: Candidate, uniform: bool) -> tuple[Tensor, Tensor | None]:
    """What a candidate reads from a batch: tokens (or a stack of layers) and a mask, ``None`` if nothing is padded."""
    hidden, mask = features.select(candidate.tokens)
    where = [features.layers.index(layer) for layer in candidate.layers]
    if len(where) == hidden.shape[1] and where == list(range(len(where))):
        chosen = hidden
    else:
        chosen = hidden[:, where]
    stack = candidate.reads_stack
    return (chosen if stack else chosen[:, 0]), (None if uniform else mask)


@dataclass
class Group:
    """One candidate in training: its stack, optimiser, and the best state of every member so far."""

    candidate: Candidate
    stack: StackedReadout
    objective: Objective
    schedule: Schedule
    uniform: bool
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: np.ndarray = field(default_factory=lambda: np.empty(0))
    best_loss: np.ndarray = field(default_factory=lambda: np.empty(0))
    best_epoch: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))
    seconds: float = 0.0
    epoch: int = 0
    finished: bool = False

    @classmethod
    def create(cls, candidate: Candidate, dim: int, objective: Objective, schedule: Schedule, uniform: bool) -> Group:
        """A fresh group with every member at its seed's initialisation."""
        stack = StackedReadout(lambda: candidate.make(dim), list(candidate.members), objective.outputs)
        group = cls(candidate, stack, objective, schedule, uniform)
        group.best = stack.state()
        count = len(candidate.members)
        group.best_score = np.full(count, -np.inf)
        group.best_loss = np.full(count, np.inf)
        group.best_epoch = np.zeros(count, dtype=int)
        group._new_optimizer()
        return group

    def _new_optimizer(self) -> None:
        members = self.stack.members
        queries = self.stack.template.query_parameters
        factor = torch.tensor([m.query_factor for m in members])
        self.optimizer = OPTIMIZERS[self.schedule.optimizer](
            self.stack.params,
            torch.tensor([m.lr for m in members]),
            {f"pooling.{name}": factor for name in queries},
            self.schedule.weight_decay,
        )

    def step(self, features: Features, targets: Tensor, rate: float) -> Tensor:
        """One update on one batch; returns the loss of every member, ``(members,)``."""
        start = time.perf_counter()
        self.stack.train()
        tokens, mask = select_tokens(features, self.candidate, self.uniform)
        losses = self.objective.loss(self.stack(tokens, mask), targets)
        names = list(self.stack.params)
        grads = torch.autograd.grad(losses.sum(), [self.stack.params[name] for name in names], allow_unused=True)
        self.optimizer.step({n: g for n, g in zip(names, grads, strict=True) if g is not None}, rate)
        self.seconds += time.perf_counter() - start
        return losses.detach()

    @torch.no_grad()
    def outputs(self, batches: Iterable[tuple[Features, Tensor]]) -> tuple[Tensor, Tensor]:
        """Outputs of all members in eval mode, ``(members, items, outputs)``, and the targets."""
        self.stack.eval()
        results, targets = [], []
        for features, wanted in batches:
            results.append(self.stack(*select_tokens(features, self.candidate, self.uniform)))
            targets.append(wanted)
        return torch.cat(results, dim=1), torch.cat(targets)

    def validate(self, validation: Feed) -> None:
        """Score every member on the validation part and keep those that improved."""
        start = time.perf_counter()
        scores, losses = self.validation_scores(validation)
        scores = np.where(np.isfinite(losses), scores, -np.inf)
        better = (scores > self.best_score) | ((scores == self.best_score) & (losses < self.best_loss))
        if better.any():
            chosen = torch.from_numpy(better)
            for name, tensor in self.stack.state().items():
                self.best[name][chosen] = tensor[chosen]
            self.best_score[better], self.best_loss[better] = scores[better], losses[better]
            self.best_epoch[better] = self.epoch
        self.seconds += time.perf_counter() - start

    def validation_scores(self, validation: Feed) -> tuple[np.ndarray, np.ndarray]:
        """Score and loss of every member on the validation part, ``(members,)`` each; the loss decides between equal
        scores, and one that is not finite is worse than any."""
        outputs, targets = self.outputs(validation.batches(SCORED))
        losses = self.objective.loss(outputs, targets).double().cpu().numpy()
        scores = self.objective.item_scores(self.objective.predictions(outputs), targets.cpu().numpy()).mean(axis=-1)
        return scores, losses

    def end_epoch(self) -> None:
        """Drop weak learning rates at the pruning points, and stop when nothing improves any more."""
        self.epoch += 1
        for fraction in self.schedule.prune_at:
            if self.epoch == max(1, math.ceil(fraction * self.schedule.epochs)):
                self._prune()
        patience = self.schedule.patience
        stale = patience is not None and self.epoch - int(self.best_epoch.max()) > patience
        self.finished = stale or self.epoch >= self.schedule.epochs

    def ranking(self) -> list[tuple[float, float]]:
        """(learning rate, query factor) pairs still in the race, best first by mean validation score, then loss."""
        members = self.stack.members
        pairs = list(dict.fromkeys((m.lr, m.query_factor) for m in members))

        def worth(pair: tuple[float, float]) -> tuple[float, float]:
            own = [i for i, m in enumerate(members) if (m.lr, m.query_factor) == pair]
            return float(self.best_score[own].mean()), -float(self.best_loss[own].mean())

        return sorted(pairs, key=worth, reverse=True)

    def _prune(self) -> None:
        order = self.ranking()
        kept = set(order[: math.ceil(len(order) / 2)])
        if len(kept) == len(order):
            return
        self._keep([i for i, m in enumerate(self.stack.members) if (m.lr, m.query_factor) in kept])

    def _keep(self, indices: list[int]) -> None:
        index = torch.tensor(indices)
        self.stack.keep(indices)
        self.optimizer.keep(index, self.stack.params)
        self.best = {name: t[index] for name, t in self.best.items()}
        self.best_score, self.best_loss = self.best_score[indices], self.best_loss[indices]
        self.best_epoch = self.best_epoch[indices]

    def winners(self) -> list[int]:
        """Members (one a seed) of the best learning rate."""
        best = self.ranking()[0]
        return [i for i, m in enumerate(self.stack.members) if (m.lr, m.query_factor) == best]

    def outcome(self, test: Feed, complete: bool) -> Outcome:
        """The winning members scored on the test part, the only time it is looked at; the others are dropped."""
        winners = self.winners()
        best = max(winners, key=lambda i: (self.best_score[i], -self.best_loss[i]))
        pooling, norm, linear = self.stack.member(self.best, best)
        lr, factor = self.stack.members[best].lr, self.stack.members[best].query_factor
        validation, epochs = float(self.best_score[winners].mean()), float(self.best_epoch[winners].mean()) + 1
        self.stack.load(self.best)
        self._keep(winners)
        start = time.perf_counter()
        outputs, _ = self.outputs(test.batches(512))
        seconds = self.seconds + time.perf_counter() - start
        params = sum(p.numel() for m in (pooling, linear) for p in m.parameters())
        return Outcome(
            readout=self.candidate.readout, layers=self.candidate.layers, tokens=self.candidate.tokens,
            candidate=self.candidate, pooling=pooling, head=nn.Sequential(norm, linear).eval(),
            predictions=self.objective.predictions(outputs), validation=validation, params=params, seconds=seconds,
            lr=lr, query_factor=factor if self.stack.template.query_parameters else None, epochs=epochs,
            status="done" if complete or self.finished else "partial",
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write everything :meth:`restore` needs; each file appears whole or not at all."""
        tensors = {f"stack.{n}": t for n, t in self.stack.state().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        tensors |= {f"optimizer.{n}": t for n, t in self.optimizer.state_dict().items()}
        scalars = {
            "epoch": self.epoch, "finished": self.finished, "seconds": self.seconds,
            "members": [[m.lr, m.query_factor, m.seed] for m in self.stack.members],
            "best_score": self.best_score.tolist(), "best_loss": self.best_loss.tolist(),
            "best_epoch": self.best_epoch.tolist(),
        }  # fmt: skip
        packed = {name: t.contiguous() for name, t in tensors.items()}
        write_whole(self._path(folder), save(packed, metadata={"state": json.dumps(scalars)}))

    def _path(self, folder: Path) -> Path:
        return folder / f"{hashlib.sha256(self.candidate.key.encode()).hexdigest()[:16]}.safetensors"

    def restore(self, folder: Path) -> bool:
        """Take up a saved state; ``False`` if there is none."""
        path = self._path(folder)
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            scalars = json.loads(file.metadata()["state"])
        tensors = load_file(path)
        saved = [tuple(m) for m in scalars["members"]]
        self._keep([i for i, m in enumerate(self.stack.members) if (m.lr, m.query_factor, m.seed) in saved])
        part = {
            p: {n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)}
            for p in ("stack.", "best.", "optimizer.")
        }
        self.stack.load(part["stack."])
        self.best = part["best."]
        self.optimizer.load_state_dict(part["optimizer."])
        self.epoch, self.finished, self.seconds = scalars["epoch"], scalars["finished"], scalars["seconds"]
        self.best_score, self.best_loss = np.array(scalars["best_score"]), np.array(scalars["best_loss"])
        self.best_epoch = np.array(scalars["best_epoch"])
        return True


def train_groups(
    groups: Sequence[Group],
    views: Sequence[Feed],
    validation: Feed,
    schedule: Schedule,
    *,
    folder: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[Sequence[Group], int], None] = lambda groups, epoch: None,
    save_every: float = 20.0,
) -> bool:
    """Train the groups together until all have finished.

    Args:
        groups: candidates in training; each may start from a restored epoch.
        views: the training part; augmented views of it take turns by epoch.
        validation: scored after every epoch.
        folder: where states are saved: after an epoch, at most every ``save_every`` seconds, and at the end. An
            interruption costs what came after the last save; the numbers of a resumed run are those of an
            uninterrupted one.
        stop: asked after every step; training ends early when true.
        on_epoch: called after every epoch.

    Returns:
        Whether every group ran its schedule.
    """
    steps = math.ceil(len(views[0]) / schedule.batch_size)
    last_save = time.monotonic()
    epoch = min((g.epoch for g in groups if not g.finished), default=schedule.epochs)
    with side_by_side(len(groups)) as every:

        def run(call: Callable[[Group], object], these: Sequence[Group]) -> None:
            for _ in every(call, these):
                pass

        while epoch < schedule.epochs and any(not g.finished for g in groups):
            active = [g for g in groups if not g.finished and g.epoch == epoch]
            feed = views[epoch % len(views)]
            seed = schedule.order_seed * 100_003 + epoch
            for number, (features, targets) in enumerate(feed.batches(schedule.batch_size, seed)):
                if len(targets) < 2:
                    continue  # batch norm has no variance on a single item
                rate = warmup_cosine(epoch + number / steps, schedule.epochs, schedule.warmup)
                run(partial(Group.step, features=features, targets=targets, rate=rate), active)
                if stop():
                    unscored = [g for g in active if not np.isfinite(g.best_score).any()]
                    run(partial(Group.validate, validation=validation), unscored)
                    return False
            run(partial(Group.validate, validation=validation), active)
            for group in active:
                group.end_epoch()
            epoch += 1
            on_epoch(groups, epoch)
            if folder is not None and (time.monotonic() - last_save > save_every or all(g.finished for g in groups)):
                for group in groups:
                    group.save(folder)
                last_save = time.monotonic()
    return True
