"""From judged outcomes to the ranked table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cenote.backbones.base import Backbone
from cenote.data.judged import JudgedData
from cenote.pooling.base import Pooling
from cenote.probe.cost import latency_ms, macs
from cenote.probe.feed import Feed
from cenote.probe.judged_scores import Judge
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Host
from cenote.probe.result import ProbeResult, Row
from cenote.probe.rows import ENTROPY_ITEMS, GALLERY_ITEMS, _look
from cenote.probe.statistics import percentile_interval, tie_groups
from cenote.probe.train import select_tokens


def assemble_judged(
    outcomes: Sequence[Outcome], data: JudgedData, feed: Feed, judge: Judge, host: Host, settings: dict[str, Any],
    notes: Sequence[str], backbone: Backbone,
) -> ProbeResult:  # fmt: skip
    """Rank the outcomes by their score and gather what the report shows."""
    targets = judge.targets
    mean = {o.key: float(np.mean([judge.score(one, targets) for one in o.predictions])) for o in outcomes}
    order = sorted(outcomes, key=lambda o: -mean[o.key])
    boot = judge.bootstrap([o.predictions for o in order])
    ties = tie_groups(boot)
    numbers = judge.items[:ENTROPY_ITEMS]
    some = feed.take(torch.from_numpy(numbers))[0]
    rows, galleries = [], []
    for place, (outcome, tie) in enumerate(zip(order, ties, strict=True)):
        # Draws are moved to have the score as their mean, and so may leave what the score can be.
        low, high = np.clip(percentile_interval(boot.draws[place]), *judge.bounds).tolist()
        entropy = None
        if outcome.candidate is not None:
            assert isinstance(outcome.pooling, Pooling)
            assert outcome.head is not None
            tokens, mask = select_tokens(some, outcome.candidate, host.uniform)
            few = tokens[:32], None if mask is None else mask[:32]
            outcome.macs = macs(outcome.pooling, outcome.head, *few)
            outcome.latency_ms = latency_ms(outcome.pooling, outcome.head, *few)
            if outcome.pooling.attends:
                entropy, gallery = _look(outcome, outcome.pooling, tokens, mask, host)
                galleries.append(gallery)
        figures = [judge.figures(one) for one in outcome.predictions]
        rows.append(
            Row(
                readout=outcome.readout, layers=",".join(map(str, outcome.layers)), tokens=outcome.tokens,
                score=mean[outcome.key], ci_low=low, ci_high=high, metric=judge.metric, validation=outcome.validation,
                params=outcome.params, macs=outcome.macs, latency_ms=outcome.latency_ms, train_seconds=outcome.seconds,
                lr=outcome.lr, regularisation=None, query_factor=outcome.query_factor, attention_entropy=entropy,
                epochs=outcome.epochs, seeds=len(outcome.predictions), tie_group=tie, status=outcome.status,
                extra={name: float(np.mean([each[name] for each in figures])) for name in figures[0]},
            )
        )  # fmt: skip
    shown = [data.items[int(i)] for i in numbers[:GALLERY_ITEMS]] if galleries else []
    show: Callable[[Any], Any] = backbone.input_image if data.modality == "image" else backbone.token_strings
    return ProbeResult(
        rows=tuple(rows), settings=settings, classes=(), predictions={o.key: o.predictions for o in order},
        targets=targets, gallery_items=tuple(show(item) for item in shown),
        gallery_grid=None if host.grid is None else (host.grid.height, host.grid.width),
        galleries=tuple(galleries), notes=tuple(notes),
    )  # fmt: skip
