"""A trained or fitted candidate, before it becomes a row of the table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from cenote.probe.plan import Candidate
from cenote.types import TokenChoice


@dataclass
class Outcome:
    """What one readout came to.

    Attributes:
        readout, layers, tokens: what it is and reads.
        candidate: how to build it; ``None`` for nearest neighbours and the encoder's own pooler.
        pooling: the pooling of the seed best on validation, in eval mode, or ``None``.
        head: normalisation and linear layer on its vectors, in eval mode; ``None`` for nearest neighbours.
        predictions: ``(seeds, items, outputs)`` on the test part; one seed where the fit is exact.
        validation: validation score that chose the setting.
        params: trainable parameters.
        seconds: wall time spent on it.
        lr, query_factor, regularisation: the chosen setting, ``None`` where it has none.
        epochs: epochs until the kept state.
        macs, latency_ms: cost an item where there is no pooling to measure.
        status: ``"done"`` or ``"partial"``.
    """

    readout: str
    layers: tuple[int, ...]
    tokens: TokenChoice
    candidate: Candidate | None
    pooling: nn.Module | None
    head: nn.Sequential | None
    predictions: np.ndarray
    validation: float
    params: int
    seconds: float
    lr: float | None = None
    query_factor: float | None = None
    regularisation: float | None = None
    epochs: float | None = None
    macs: int = 0
    latency_ms: float = float("nan")
    status: str = "done"

    @property
    def key(self) -> str:
        """Unique name, as in :meth:`cenote.probe.result.ProbeResult.key`."""
        return f"{self.readout} | {','.join(map(str, self.layers))} | {self.tokens}"
