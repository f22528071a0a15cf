"""What the probe returns and writes: one row a readout, and what the report needs beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cenote.probe.open_set_result import OpenSetResult

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One line of the ranked table (and one object of ``results.json``).

    Attributes:
        readout: spec of the pooling as given to :func:`cenote.pooling.create_pooling`, or ``knn``, ``encoder_pooler``.
        layers: hidden states it reads, as text (``"12"`` or ``"1,2,3"``).
        tokens: ``"class"``, ``"patches"`` or ``"both"``.
        score: test score, mean over seeds; accuracy, mean average precision or R^2 (``metric`` says which).
        ci_low, ci_high: 95 % interval of ``score``, bootstrap over test items and seeds.
        metric: name of the score.
        validation: validation score that chose the learning rate.
        params: trainable parameters of pooling and head.
        macs: multiply-accumulates of the readout (pooling and head) for one item.
        latency_ms: time of the readout for one item in a batch of 32, in milliseconds.
        train_seconds: wall time spent on this readout (all learning rates and seeds).
        lr: chosen learning rate, or ``None`` for closed-form and L-BFGS fits.
        regularisation: chosen penalty of those fits, or ``None``.
        query_factor: learning-rate factor of the learned queries that was chosen, or ``None``.
        attention_entropy: mean entropy of the attention over log(tokens), 1 = uniform; ``None`` where nothing attends.
        epochs: epochs until the kept state (mean over seeds), or ``None``.
        seeds: number of seeds.
        tie_group: readouts with the same number do not differ significantly from the best of the group (1 = the top
            group).
        status: ``"done"``, or ``"partial"`` when the run was stopped before this readout's schedule ended.
        extra: further figures of the same readout by name (``pearson``, ``recall@10``, ``auoscr``, ...).
    """

    readout: str
    layers: str
    tokens: str
    score: float
    ci_low: float
    ci_high: float
    metric: str
    validation: float
    params: int
    macs: int
    latency_ms: float
    train_seconds: float
    lr: float | None
    regularisation: float | None
    query_factor: float | None
    attention_entropy: float | None
    epochs: float | None
    seeds: int
    tie_group: int
    status: str = "done"
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """What an attentive readout looks at on a few test items.

    Attributes:
        readout: the row's readout.
        weights: ``(items, queries, tokens)``, padded with 0.
        entropy: attention entropy of each query over log(tokens), ``(queries,)``.
    """

    readout: str
    weights: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class ProbeResult:
    """The whole outcome of a probe.

    Attributes:
        rows: ranked, best first.
        settings: everything that determines the run (backbone, data, layers, tokens, seeds, ...), JSON-able.
        classes: class names, empty for regression.
        predictions: readout key (see :meth:`key`) to ``(seeds, items, outputs)`` test scores: class probabilities, or
            values.
        targets: ``(items,)`` or ``(items, classes)`` test targets.
        gallery_items: raw items (PIL images, or lists of token strings) that the galleries show.
        gallery_grid: rows and columns of the patch grid of those items, or ``None`` for text.
        gallery_prefix: prefix tokens in front of the grid in ``Gallery.weights``.
        galleries: one an attentive readout, best first.
        notes: things a reader must know (skipped items, stopped early, ...).
        open_set: how every readout treats items of no known class, where that was asked for.
        interrupted: whether the run was interrupted and the table holds what there was.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    classes: tuple[str, ...]
    predictions: dict[str, np.ndarray]
    targets: np.ndarray
    gallery_items: tuple[Any, ...] = ()
    gallery_grid: tuple[int, int] | None = None
    gallery_prefix: int = 0
    galleries: tuple[Gallery, ...] = ()
    notes: tuple[str, ...] = field(default=())
    folder: Path | None = None
    open_set: OpenSetResult | None = None
    interrupted: bool = False

    @staticmethod
    def key(row: Row) -> str:
        """Key of a row in :attr:`predictions`: ``readout | layers | tokens``."""
        return f"{row.readout} | {row.layers} | {row.tokens}"

    def frame(self) -> pd.DataFrame:
        """The ranked table, :attr:`Row.extra` spread over columns of its own."""
        rows = [asdict(row) for row in self.rows]
        return pd.DataFrame([row | row.pop("extra") for row in rows])
