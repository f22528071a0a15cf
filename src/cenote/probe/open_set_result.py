"""What an open-set probe adds to the result: a table of readouts and scores, and curves of the best readout."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cenote.files import write_whole

FOLDER = "open_set"


@dataclass(frozen=True)
class OpenSetRow:
    """One score on one readout.

    Attributes:
        readout, layers, tokens: the row of the probe's table.
        method: name in :data:`cenote.inspection.OPEN_SET_SCORES`.
        auroc: probability that a known test item scores above an unknown one.
        auoscr: area under correct classification rate over false positive rate.
        oosa: share of test items treated rightly at ``threshold``.
        fpr95: share of unknowns accepted where 95 % of the knowns are.
        accuracy: closed-set accuracy of the seed that was judged.
        threshold: chosen on validation items and surrogate unknowns; infinite where rejecting everything was best.
    """

    readout: str
    layers: str
    tokens: str
    method: str
    auroc: float
    auoscr: float
    oosa: float
    fpr95: float
    accuracy: float
    threshold: float

    @property
    def key(self) -> str:
        """``readout | layers | tokens``, as in :meth:`cenote.probe.result.ProbeResult.key`."""
        return f"{self.readout} | {self.layers} | {self.tokens}"


@dataclass(frozen=True)
class OpenSetResult:
    """Every readout judged by every score.

    Attributes:
        rows: the table, readouts in the probe's order, COSTARR first of each.
        best: ``readout | layers | tokens`` of :attr:`curves` and :attr:`scorer`: the first row of the probe's table
            that has a linear head.
        curves: method to ``(2, points)``: false positive rate and correct classification rate, from (0, 0).
        scorer: the fitted COSTARR of that readout (:class:`cenote.inspection.CoStarr`).
        threshold: its threshold.
        note: where the unknowns come from.
    """

    rows: tuple[OpenSetRow, ...]
    best: str
    curves: dict[str, np.ndarray]
    scorer: Any
    threshold: float
    note: str

    def frame(self) -> pd.DataFrame:
        """The table, one line for each readout and method."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def save(self, folder: Path) -> None:
        """Write ``open_set.json`` and ``open_set.csv``, and the scorer into ``best/open_set/``.

        An infinite threshold is ``null`` in JSON and ``inf`` in the CSV.
        """
        records = [asdict(row) for row in self.rows]
        clean = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            for record in records
        ]
        write_whole(folder / "open_set.json", json.dumps(clean, indent=2).encode())
        write_whole(folder / "open_set.csv", self.frame().to_csv(index=False))
        threshold = self.threshold if math.isfinite(self.threshold) else None
        self.scorer.save_pretrained(folder / "best" / FOLDER, threshold=threshold, unknowns=self.note)
