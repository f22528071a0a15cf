"""The winning readout as an artefact that loads elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from cenote.backbones.base import Backbone
from cenote.probe.artefact import ENCODER_POOLER
from cenote.probe.plan import Host
from cenote.probe.readout import Readout, ReadoutConfig
from cenote.probe.result import ProbeResult, Row
from cenote.probe.tasks import Objective

if TYPE_CHECKING:
    from cenote.probe.outcome import Outcome


def best_readout(
    result: ProbeResult, outcomes: list[Outcome], backbone: Backbone, host: Host, objective: Objective
) -> Readout | None:
    """The first row of the table that is a module (nearest neighbours are not); of its seeds the one best on
    validation."""
    by_key = {outcome.key: outcome for outcome in outcomes}
    row: Row
    for row in result.rows:
        outcome = by_key[ProbeResult.key(row)]
        if outcome.head is not None:
            break
    else:
        return None
    norm, head = outcome.head[0], outcome.head[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(head, nn.Linear)
    candidate = outcome.candidate
    config = ReadoutConfig(
        pooling=ENCODER_POOLER if candidate is None else candidate.readout,
        options={} if candidate is None else dict(candidate.options),
        dim=head.in_features if candidate is None else host.dim,
        layers=outcome.layers, tokens=outcome.tokens, grid=host.grid, task=objective.task, classes=result.classes,
        outputs=objective.outputs, backbone=backbone.spec, revision=getattr(backbone, "revision", None),
        backbone_options=result.settings["backbone_options"], backbone_fingerprint=backbone.fingerprint(),
        norm_eps=norm.eps,
        target_mean=objective.target_mean, target_std=objective.target_std,
        table=tuple(asdict(r) for r in result.rows), data=str(result.settings["data"]),
    )  # fmt: skip
    return Readout(config, outcome.pooling, norm, head)  # type: ignore[arg-type]


def save_best(
    result: ProbeResult, outcomes: list[Outcome], backbone: Backbone, host: Host, objective: Objective, folder: Path
) -> None:
    """Write :func:`best_readout` into ``folder``."""
    readout = best_readout(result, outcomes, backbone, host, objective)
    if readout is not None:
        readout.save_pretrained(folder)
