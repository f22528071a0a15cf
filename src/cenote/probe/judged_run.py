"""The work of a judged probe: every readout judged as it is, or trained and judged."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from cenote.data.judged import JudgedData, Labels
from cenote.probe.display import Display
from cenote.probe.feed import Feed
from cenote.probe.judged_files import Finished
from cenote.probe.judged_scores import Judge
from cenote.probe.judged_training import Loss, labelled_group, labelled_part, train_contrastive, validation_judge
from cenote.probe.judged_vectors import Part, reader, standardisation, vectors_of
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Candidate, Host
from cenote.probe.train import Group, Schedule, train_groups
from cenote.probe.write import Folder

if TYPE_CHECKING:
    from cenote.tuning.embedding import ContrastiveSettings


@dataclasses.dataclass
class JudgedRun:
    """The judging of one data set; finished readouts gather in :attr:`outcomes`."""

    data: JudgedData
    feed: Feed
    host: Host
    judge: Judge
    display: Display
    stop: Callable[[], bool]
    finished: Finished
    standardise: bool
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)

    def judge_free(self, jobs: Sequence[Candidate | None]) -> None:
        """Readouts without parameters, and the encoder's own pooler (``None``)."""
        if jobs:
            self.display.stage("judge readouts without parameters", len(jobs))
        for candidate in jobs:
            if self.outcomes and self.stop():
                self.left_out.append("encoder_pooler" if candidate is None else candidate.key)
                continue
            start = time.perf_counter()
            pooling = None if candidate is None else candidate.make(self.host.dim).eval()
            read = reader(pooling, candidate, self.host.uniform)
            head = nn.Sequential()
            if self.standardise:
                assert isinstance(self.data.train, Labels)
                head.append(standardisation(vectors_of(self.feed, self.data.train.items, read).table))
            head.eval()
            outputs = self.judge.outputs(vectors_of(self.feed, self.judge.items, read, head))
            validation = math.nan
            if self.data.validation is not None and not self.data.chosen_by_labels:
                judge = validation_judge(self.data)
                validation = judge.score(judge.outputs(vectors_of(self.feed, judge.items, read, head)), judge.targets)
            self._add(
                Outcome(
                    readout="encoder_pooler" if candidate is None else candidate.readout,
                    layers=(self.feed.layers[-1],) if candidate is None else candidate.layers,
                    tokens="both" if candidate is None else candidate.tokens, candidate=candidate, pooling=pooling,
                    head=head.eval(), predictions=outputs[None], validation=validation, params=0,
                    seconds=time.perf_counter() - start,
                )
            )  # fmt: skip

    def train_labelled(
        self, candidates: Sequence[Candidate], schedule: Schedule, loss: Loss, folder: Folder | None
    ) -> None:
        """All together on labels; the heads are dropped."""
        train, validation = self.data.train, self.data.validation
        assert isinstance(train, Labels)
        if self.data.chosen_by_labels:
            assert isinstance(validation, Labels)
            judge, held = None, labelled_part(self.feed, validation)
        else:
            judge = validation_judge(self.data)
            held = Part(self.feed, torch.from_numpy(judge.items))
        parts = labelled_part(self.feed, train), held
        groups = [
            labelled_group(
                c, self.host.dim, len(train.names), schedule, self.host.uniform, loss, judge, self.standardise
            )
            for c in candidates
        ]
        if folder is not None and folder.resuming:
            restored = sum(group.restore(folder.checkpoint) for group in groups)
            self.display.say(f"resuming: {restored} of {len(groups)} readouts restored")
        members = sum(len(group.stack.members) for group in groups)
        self.display.stage(f"train {len(groups)} readouts, {members} heads", schedule.epochs)
        self.display.advance(min(group.epoch for group in groups))
        interrupted = False
        try:
            complete = train_groups(
                groups, [parts[0]], parts[1], schedule, folder=folder.checkpoint if folder else None, stop=self.stop,
                on_epoch=lambda active, epoch: self.display.advance(1),
            )  # fmt: skip
        except KeyboardInterrupt:  # the best states so far are judged before it goes on its way
            complete, interrupted = False, True
        self.display.stage("judge trained readouts", len(groups))
        for group in groups:
            if np.isfinite(group.best_score).any():
                self._judge_group(group, complete)
            else:
                self.left_out.append(group.candidate.key)
        if interrupted:
            raise KeyboardInterrupt

    def _judge_group(self, group: Group, complete: bool) -> None:
        start = time.perf_counter()
        winners = group.winners()
        best = max(winners, key=lambda i: (group.best_score[i], -group.best_loss[i]))
        outputs, kept = [], None
        for member in winners:
            pooling, norm, _ = group.stack.member(group.best, member)
            head = nn.Sequential(norm) if self.standardise else nn.Sequential()
            read = reader(pooling, group.candidate, self.host.uniform)
            outputs.append(self.judge.outputs(vectors_of(self.feed, self.judge.items, read, head)))
            kept = (pooling, head) if member == best else kept
        assert kept is not None
        chosen = group.stack.members[best]
        self._add(
            Outcome(
                readout=group.candidate.readout, layers=group.candidate.layers, tokens=group.candidate.tokens,
                candidate=group.candidate, pooling=kept[0], head=kept[1].eval(), predictions=np.stack(outputs),
                validation=float(group.best_score[winners].mean()), params=_size_of(kept[0]),
                seconds=group.seconds + time.perf_counter() - start, lr=chosen.lr,
                query_factor=chosen.query_factor if group.stack.template.query_parameters else None,
                epochs=float(group.best_epoch[winners].mean()) + 1,
                status="done" if complete or group.finished else "partial",
            )
        )  # fmt: skip

    def train_contrastive(
        self, candidates: Sequence[Candidate], settings: ContrastiveSettings, lrs: Sequence[float], seeds: int
    ) -> None:
        """One by one on pairs or relevance; what is done is kept and taken up by a run that goes on."""
        fits = len(lrs) + seeds - 1
        self.display.stage(f"train {len(candidates)} readouts", len(candidates) * fits)
        for candidate in candidates:
            known = self.finished.take(candidate, self.host.dim)
            if known is not None:
                self.display.advance(fits)
                self._add(known)
                continue
            trained = None if self.stop() else train_contrastive(
                candidate, self.feed, self.data, self.host, settings, lrs, seeds,
                progress=lambda: self.display.advance(1), stop=self.stop,
            )  # fmt: skip
            if trained is None:
                self.left_out.append(candidate.key)
                continue
            outputs = [
                self.judge.outputs(
                    vectors_of(self.feed, self.judge.items, reader(pooling, candidate, self.host.uniform))
                )
                for pooling in trained.poolings
            ]
            outcome = Outcome(
                readout=candidate.readout, layers=candidate.layers, tokens=candidate.tokens, candidate=candidate,
                pooling=trained.poolings[trained.best], head=nn.Sequential(), predictions=np.stack(outputs),
                validation=trained.validation, params=_size_of(trained.poolings[0]), seconds=trained.seconds,
                lr=trained.lr, query_factor=settings.query_factor if trained.poolings[0].query_parameters else None,
            )  # fmt: skip
            self.finished.keep(outcome)
            self._add(outcome)

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        score = np.mean([self.judge.score(one, self.judge.targets) for one in outcome.predictions])
        self.display.advance(0 if outcome.lr is not None else 1, f"{score:.3f} {outcome.readout}")


def _size_of(pooling: nn.Module) -> int:
    return sum(p.numel() for p in pooling.parameters())
