"""Training readouts for the judged tasks: on labels with a head that is dropped, or contrastively on judgements."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.data.judged import JudgedData, Labels, Relevance
from cenote.pooling.base import Pooling
from cenote.probe.feed import Feed
from cenote.probe.heads import StackedReadout
from cenote.probe.judged_scores import ClusteringJudge, Judge, judge_of
from cenote.probe.judged_vectors import Part, Vectors, reader, vectors_of
from cenote.probe.plan import Candidate, Host
from cenote.probe.tasks import Objective
from cenote.probe.train import SCORED, Group, Schedule, select_tokens
from cenote.tuning.margin import additive_angular_margin

if TYPE_CHECKING:
    from cenote.tuning.embedding import ContrastiveSettings

Loss = Literal["auto", "margin", "cross_entropy"]
CONTRASTIVE_LRS = (1e-3, 1e-2)
"""Smaller than those of heads behind a batch norm, which evens out the scale of what is in front."""
VALIDATION_DOCUMENTS = 1000


@dataclasses.dataclass(frozen=True)
class AngularObjective(Objective):
    """Classification by cosines, the angle to an item's own class enlarged by ``margin`` (additive angular margin)."""

    margin: float = 0.2
    scale: float = 30.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of each member from cosines ``(members, batch, classes)``."""
        logits = additive_angular_margin(outputs.transpose(0, 1), targets, self.margin, self.scale)
        members = outputs.shape[0]
        each = F.cross_entropy(logits.flatten(0, 1), targets.repeat_interleave(members), reduction="none")
        return each.view(-1, members).mean(dim=0)


class AngularReadout(StackedReadout):
    """A stack whose heads give the cosine of the normalised vector with each class's direction; biases are unused."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cosines of every member, ``(members, batch, classes)``."""
        unit = F.normalize(self._norm(self.pool(tokens, mask)[0]), dim=-1)
        return unit @ F.normalize(self.params["head.weight"], dim=-1).mT


@dataclasses.dataclass
class JudgedGroup(Group):
    """A candidate whose members are scored after every epoch by what the task makes of their vectors.

    Attributes:
        judge: of the validation part; ``None`` scores the labels, as :class:`~cenote.probe.train.Group` does.
        standardise: whether vectors go through the batch norm first, as those of the test part do.
    """

    judge: Judge | None = None
    standardise: bool = True

    @torch.no_grad()
    def validation_scores(self, validation: Feed) -> tuple[np.ndarray, np.ndarray]:
        if self.judge is None:
            return super().validation_scores(validation)
        self.stack.eval()
        pieces = []
        for features, _ in validation.batches(SCORED):
            pooled = self.stack.pool(*select_tokens(features, self.candidate, self.uniform))[0]
            pieces.append((self.stack._norm(pooled) if self.standardise else pooled.float()).cpu())
        place = np.full(int(self.judge.items.max()) + 1, -1)
        place[self.judge.items] = np.arange(len(self.judge.items))
        scores = np.full(len(self.stack.members), -np.inf)
        for member, table in enumerate(torch.cat(pieces, dim=1)):
            if table.isfinite().all():
                scores[member] = self.judge.score(self.judge.outputs(Vectors(table, place)), self.judge.targets)
        return scores, -scores


def labelled_group(
    candidate: Candidate, dim: int, classes: int, schedule: Schedule, uniform: bool, loss: Loss,
    judge: Judge | None = None, standardise: bool = True,
) -> JudgedGroup:  # fmt: skip
    """A candidate in training to tell classes apart, behind a head that is dropped afterwards; ``judge`` and
    ``standardise`` as in :class:`JudgedGroup`."""
    plain = Objective("classification", classes)
    group = JudgedGroup.create(candidate, dim, plain, schedule, uniform)
    assert isinstance(group, JudgedGroup)
    group.judge, group.standardise = judge, standardise
    if loss == "margin":
        group.objective = AngularObjective("classification", classes)
        group.stack = AngularReadout(lambda: candidate.make(dim), list(candidate.members), classes)
        group.best = group.stack.state()
        group._new_optimizer()
    return group


def labelled_part(whole: Feed, labels: Labels) -> Part:
    """The items of labels with their classes as targets."""
    return Part(whole, torch.from_numpy(labels.items), torch.from_numpy(labels.label))


class Trained(NamedTuple):
    """A candidate after contrastive training.

    Attributes:
        poolings: one a seed.
        best: which of them scored highest on the validation part.
        lr: the learning rate that was best on the validation part.
        validation: its score there, mean over seeds.
        seconds: wall time of everything tried.
    """

    poolings: list[Pooling]
    best: int
    lr: float
    validation: float
    seconds: float


def train_contrastive(
    candidate: Candidate,
    feed: Feed,
    data: JudgedData,
    host: Host,
    settings: ContrastiveSettings,
    lrs: Sequence[float],
    seeds: int,
    *,
    progress: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained | None:
    """Train a candidate by :func:`cenote.tuning.embedding.train_embedding`.

    The first seed tries every learning rate; the others take the one that was best on the validation part.
    ``progress`` is called behind every training; ``None`` comes back when ``stop`` says so in between.
    """
    from cenote.tuning.embedding import train_embedding

    begin = time.perf_counter()
    train = data.train
    assert train is not None
    judge = None if data.validation is None else validation_judge(data)

    def read(items: Tensor) -> tuple[Tensor, Tensor | None]:
        return select_tokens(feed.take(items)[0], candidate, host.uniform)

    def worth(pooling: Pooling) -> float:
        assert judge is not None
        found = vectors_of(feed, judge.items, reader(pooling, candidate, host.uniform))
        return judge.score(judge.outputs(found), judge.targets)

    def fit(lr: float, seed: int) -> tuple[Pooling, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = candidate.make(host.dim).to(feed.device)
        chosen = dataclasses.replace(settings, lr=lr, seed=settings.seed + seed)
        pooling = train_embedding(fresh, read, train, chosen, evaluate=None if judge is None else worth).eval()
        progress()
        return pooling, math.nan if judge is None else worth(pooling)

    tried: list[tuple[float, Pooling, float]] = []
    for lr in lrs if judge is not None else lrs[:1]:
        if stop():
            return None
        tried.append((lr, *fit(lr, 0)))
    lr, pooling, score = max(tried, key=lambda one: (one[2], -one[0])) if judge is not None else tried[0]
    found = [(pooling, score)]
    for seed in range(1, seeds):
        if stop():
            return None
        found.append(fit(lr, seed))
    scores = [score for _, score in found]
    best = int(np.argmax(scores)) if judge is not None else 0
    return Trained([pooling for pooling, _ in found], best, lr, float(np.mean(scores)), time.perf_counter() - begin)


def validation_judge(data: JudgedData) -> Judge:
    """The judge of the validation part, which looks less closely than that of the test part: a search there is through
    at most :data:`VALIDATION_DOCUMENTS` documents, those judged relevant among them, and k-means starts once."""
    part = data.validation
    assert part is not None
    if isinstance(part, Relevance) and len(part.documents) > VALIDATION_DOCUMENTS:
        needed = np.unique(part.document)
        others = np.setdiff1d(np.arange(len(part.documents)), needed)
        drawn = np.random.default_rng(0).permutation(others)[: max(0, VALIDATION_DOCUMENTS - len(needed))]
        kept = np.sort(np.concatenate([needed, drawn]))
        part = part.with_documents(kept)
    if data.task == "clustering" and isinstance(part, Labels):
        return ClusteringJudge(part, starts=1)
    return judge_of(data.task, part)
