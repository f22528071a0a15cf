"""From outcomes to the ranked table: intervals, ties, costs, and what the attentive readouts look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cenote.backbones.base import Backbone
from cenote.data.base import Data
from cenote.pooling.base import Pooling
from cenote.probe.cost import attention_entropy, latency_ms, macs
from cenote.probe.feed import Feed
from cenote.probe.outcome import Outcome
from cenote.probe.plan import Host
from cenote.probe.result import Gallery, ProbeResult, Row
from cenote.probe.statistics import bootstrap_interval, tie_groups
from cenote.probe.tasks import Objective
from cenote.probe.train import select_tokens

GALLERY_ITEMS = 12
ENTROPY_ITEMS = 256


def assemble(
    outcomes: Sequence[Outcome], data: Data, test: Feed, objective: Objective, host: Host, settings: dict[str, Any],
    notes: Sequence[str], backbone: Backbone,
) -> ProbeResult:  # fmt: skip
    """Rank the outcomes by test score and gather what the report shows."""
    targets = data.test.targets.numpy()
    scores = {o.key: objective.item_scores(o.predictions, targets) for o in outcomes}
    order = sorted(outcomes, key=lambda o: -scores[o.key].mean())
    ties = tie_groups([scores[o.key] for o in order])
    some, _ = test.take(torch.arange(min(ENTROPY_ITEMS, len(test))))
    rows, galleries = [], []
    for outcome, tie in zip(order, ties, strict=True):
        low, high = bootstrap_interval(scores[outcome.key])
        entropy = None
        if outcome.candidate is not None and outcome.head is not None:
            pooling: Pooling = outcome.pooling  # type: ignore[assignment]
            tokens, mask = select_tokens(some, outcome.candidate, host.uniform)
            outcome.macs = macs(pooling, outcome.head, tokens, mask)
            outcome.latency_ms = latency_ms(pooling, outcome.head, tokens[:32], None if mask is None else mask[:32])
            if pooling.attends:
                entropy, gallery = _look(outcome, pooling, tokens, mask, host)
                galleries.append(gallery)
        rows.append(
            Row(
                readout=outcome.readout,
                layers=",".join(map(str, outcome.layers)),
                tokens=outcome.tokens,
                score=float(scores[outcome.key].mean()),
                ci_low=low,
                ci_high=high,
                metric=objective.metric,
                validation=outcome.validation,
                params=outcome.params,
                macs=outcome.macs,
                latency_ms=outcome.latency_ms,
                train_seconds=outcome.seconds,
                lr=outcome.lr,
                regularisation=outcome.regularisation,
                query_factor=outcome.query_factor,
                attention_entropy=entropy,
                epochs=outcome.epochs,
                seeds=len(outcome.predictions),
                tie_group=tie,
                status=outcome.status,
            )
        )
    shown = [data.test.items[i] for i in range(min(GALLERY_ITEMS, len(data.test)))]
    show: Callable[[Any], Any] = backbone.input_image if data.modality == "image" else backbone.token_strings
    return ProbeResult(
        rows=tuple(rows), settings=settings, classes=data.classes, predictions={o.key: o.predictions for o in order},
        targets=targets, gallery_items=tuple(show(item) for item in shown),
        gallery_grid=None if host.grid is None else (host.grid.height, host.grid.width),
        galleries=tuple(galleries), notes=tuple(notes),
    )  # fmt: skip


@torch.no_grad()
def _look(outcome: Outcome, pooling: Pooling, tokens: Tensor, mask: Tensor | None, host: Host) -> tuple[float, Gallery]:
    """Mean attention entropy over test items, and the weights on the first few (patches only where there is a grid)."""
    weights = pooling._pool(tokens, mask)[1]
    assert weights is not None
    entropy = attention_entropy(weights, mask)
    shown = weights[:GALLERY_ITEMS].float().cpu().numpy()
    if host.grid is not None and outcome.tokens == "both":
        shown = shown[..., host.prefix :]
    return float(entropy.mean()), Gallery(outcome.key, shown, entropy.cpu().numpy())
