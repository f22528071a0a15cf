"""Judging every readout of a probe by what it makes of items of no known class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cenote.inspection import OPEN_SET_SCORES, OpenSetScore, create_open_set_score
from cenote.ops.open_set import OSCR, auoscr, auroc, best_threshold, fpr_at_tpr, open_set_accuracy, oscr_curve
from cenote.probe.fits import IN_MEMORY, vectors
from cenote.probe.open_set_result import OpenSetResult, OpenSetRow
from cenote.probe.outcome import Outcome
from cenote.probe.parallel import side_by_side
from cenote.probe.result import ProbeResult, Row
from cenote.probe.train import select_tokens
from cenote.types import Features

IN_TABLE = ("maxlogit", "msp", "knn")
"""Methods beside COSTARR whose AUROC and AUOSCR go into the probe's own table."""
NNGUIDE_BANK, GHOST_CLASSES, CURVE_POINTS = 5000, 50, 200


class Parts(NamedTuple):
    """Features of the parts that are judged, as feeds or as vectors."""

    train: Any
    validation: Any
    test: Any
    surrogate: Any
    unknown: Any


class _Judged(NamedTuple):
    rows: list[OpenSetRow]
    curves: dict[str, OSCR]
    scorer: OpenSetScore
    left_out: list[str]


def judge(result: ProbeResult, outcomes: Sequence[Outcome], feeds: Parts, uniform: bool, note: str) -> ProbeResult:
    """Fit COSTARR and its baselines on every readout with a linear head, and add what they reach to the result.

    Of each readout the seed best on validation is judged, its vectors being the input of the linear layer. Each score
    is fitted on the training part; its threshold is the best on validation items and surrogate unknowns; then the test
    part and the test unknowns are looked at, once. Nearest-neighbour rows have no head and are left as they are.

    Args:
        result: the probe's result on known classes.
        outcomes: its readouts.
        feeds: knowns of three parts, surrogate and test unknowns.
        uniform: whether all items have the same number of tokens.
        note: where the unknowns come from.
    """
    by_key = {outcome.key: outcome for outcome in outcomes}
    judged = [row for row in result.rows if by_key[result.key(row)].head is not None]
    if not judged:
        return dataclasses.replace(result, notes=(*result.notes, note, "no readout with a linear head was judged"))
    with side_by_side(len(judged)) as every:
        found = list(every(lambda row: _judge_one(row, by_key[result.key(row)], feeds, uniform), judged))
    extras = {result.key(row): _extra(each.rows) for row, each in zip(judged, found, strict=True)}
    rows = tuple(
        dataclasses.replace(row, extra={**row.extra, **extras.get(result.key(row), {})}) for row in result.rows
    )
    top = found[0]
    open_set = OpenSetResult(
        rows=tuple(row for each in found for row in each.rows),
        best=result.key(judged[0]),
        curves={name: _thinned(curve) for name, curve in top.curves.items()},
        scorer=top.scorer,
        threshold=top.rows[0].threshold,
        note=note,
    )
    left_out = list(dict.fromkeys(text for each in found for text in each.left_out))
    notes = [note, f"Open set, left out: {'; '.join(left_out)}"] if left_out else [note]
    return dataclasses.replace(result, rows=rows, notes=(*result.notes, *notes), open_set=open_set)


def _judge_one(row: Row, outcome: Outcome, feeds: Parts, uniform: bool) -> _Judged:
    assert outcome.head is not None
    head: nn.Linear = outcome.head[1]  # type: ignore[assignment]
    read = input_of_head(outcome, uniform)
    parts = Parts(*(vectors(feed, read) for feed in feeds))
    chosen = torch.cat([feeds.validation.targets.cpu(), torch.full((len(parts.surrogate),), -1)])
    tested = torch.cat([feeds.test.targets.cpu(), torch.full((len(parts.unknown),), -1)])
    labels = feeds.train.targets.cpu()
    rows, curves, left_out, scorer = [], {}, [], None
    for name in OPEN_SET_SCORES:
        options, reason = _options(name, parts.train, head)
        if reason:
            left_out.append(reason)
            continue
        try:
            score = create_open_set_score(name, head, **options).fit(parts.train, labels)
        except ValueError as error:
            if name == "costarr":
                raise
            left_out.append(f"{name} on {row.readout} ({error})")
            continue
        scorer = scorer or score
        threshold, _ = best_threshold(*_scored(score, parts.validation, parts.surrogate), chosen)
        scores, predictions = _scored(score, parts.test, parts.unknown)
        curve = oscr_curve(scores, predictions, tested)
        curves[name] = curve
        measures = {
            "auroc": auroc(scores, tested),
            "auoscr": auoscr(curve),
            "oosa": open_set_accuracy(scores, predictions, tested, threshold),
            "fpr95": fpr_at_tpr(scores, tested),
            "accuracy": float(curve.ccr[-1]),
        }
        rows.append(OpenSetRow(row.readout, row.layers, row.tokens, name, **measures, threshold=threshold))
    assert scorer is not None
    return _Judged(rows, curves, scorer, left_out)


def input_of_head(outcome: Outcome, uniform: bool) -> Callable[[Features], Tensor]:
    """What turns a batch of features into the vectors that the readout's linear layer reads."""
    assert outcome.head is not None
    pooling, candidate, norm = outcome.pooling, outcome.candidate, outcome.head[0]
    device = next(outcome.head.parameters()).device

    def read(features: Features) -> Tensor:
        features = features.to(device)
        if pooling is None or candidate is None:
            assert features.pooled is not None
            return norm(features.pooled.float())
        return norm(pooling._pool(*select_tokens(features, candidate, uniform))[0].float())  # type: ignore[operator]

    return read


def _options(name: str, train: Tensor, head: nn.Linear) -> tuple[dict[str, Any], str]:
    """Options that fit the size of the data, or the reason why a method is left out."""
    items = len(train)
    if name == "knn":
        too_large = 4 * train.numel() > IN_MEMORY
        return {"k": min(50, items)}, f"knn (a bank of {items} items takes more than 256 MB)" if too_large else ""
    if name == "nnguide":
        fraction = min(1.0, NNGUIDE_BANK / items)
        return {"k": min(100, int(items * fraction)), "fraction": fraction}, ""
    if name == "ghost" and len(head.weight) > GHOST_CLASSES:
        return {}, f"ghost (a fit for each of {len(head.weight)} classes and readout takes too long)"
    return {}, ""


def _scored(score: OpenSetScore, knowns: Tensor, unknowns: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and predictions of both, knowns first."""
    scores = torch.cat([score.score(knowns), score.score(unknowns)]).cpu()
    predictions = torch.cat([score.logits(part).argmax(dim=1) for part in (knowns, unknowns)]).cpu()
    return scores, predictions


def _extra(rows: Sequence[OpenSetRow]) -> dict[str, float]:
    """What a line of the probe's table says: COSTARR in full, the areas of the others."""
    first, by_method = rows[0], {row.method: row for row in rows}
    extra = {"auoscr": first.auoscr, "auroc": first.auroc, "oosa": first.oosa, "fpr95": first.fpr95}
    for name in IN_TABLE:
        if name in by_method:
            extra |= {f"{name}_auoscr": by_method[name].auoscr, f"{name}_auroc": by_method[name].auroc}
    return extra


def _thinned(curve: OSCR) -> np.ndarray:
    points = torch.stack([curve.fpr, curve.ccr])
    whole = torch.cat([points.new_zeros(2, 1), points], dim=1).cpu().numpy()
    keep = np.linspace(0, whole.shape[1] - 1, min(whole.shape[1], CURVE_POINTS)).round().astype(int)
    return whole[:, np.unique(keep)]
