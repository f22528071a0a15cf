"""The ten-fold protocol of graph classification."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cenote.data import load_data
from cenote.files import write_whole
from cenote.tuning.gnn import GNNSettings, MakeReadout, Progress, train_gnn, train_head

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CrossValidation:
    """Test accuracy of every fold.

    Attributes:
        name: what was trained.
        folds: numbers of the folds.
        accuracies: test accuracy of each.
        results: further figures of each fold: epoch, validation accuracy, floored, largest weight, seconds.
    """

    name: str
    folds: tuple[int, ...]
    accuracies: tuple[float, ...]
    results: tuple[dict[str, float], ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over folds."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Standard deviation over folds (of a sample; 0 for one fold)."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    def frame(self) -> pd.DataFrame:
        """One row a fold."""
        import pandas as pd

        return pd.DataFrame([{"fold": fold, **row} for fold, row in zip(self.folds, self.results, strict=True)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folds as csv."""
        write_whole(Path(path), self.frame().to_csv(index=False))


def cross_validate(
    kind: str,
    data: str,
    readout: MakeReadout = "mean",
    settings: GNNSettings | None = None,
    *,
    folds: Sequence[int] = tuple(range(10)),
    frozen: bool = False,
    path: str | os.PathLike[str] | None = None,
    progress: Progress = lambda line: None,
    device: torch.device | str = "cpu",
) -> CrossValidation:
    """Ten-fold protocol: fold k is the test part, k + 1 the validation part that chooses the epoch, the rest trains.

    Args:
        kind, readout, settings, device: as for :func:`train_gnn`.
        data: a set of graphs for :func:`cenote.data.load_data`, ``"tu:MUTAG"`` or an archive.
        folds: which folds to run.
        frozen: train the network with the mean readout first, then the readout on its frozen history.
        path: JSON file that keeps finished folds; the same call on the same graphs goes on behind them. Functions
            that make readouts are told apart by name.
        progress: called with a line of text for every fold.

    Raises:
        ValueError: a ``path`` that belongs to another configuration or to other graphs, a lambda or another readout
            without a name where there is a ``path``, or what :func:`train_gnn` refuses.
    """
    settings = settings or GNNSettings()
    name = readout if isinstance(readout, str) else getattr(readout, "__name__", "<lambda>")
    key = {
        "kind": kind, "data": Path(data).name, "readout": name, "frozen": frozen, **dataclasses.asdict(settings),
    }  # fmt: skip
    done: dict[str, dict[str, float]] = {}
    if path is not None:
        if name == "<lambda>":
            raise ValueError("kept folds are told apart by the readout's name: give a named function, or no path")
        key["fingerprint"] = _fingerprint(data)
        if Path(path).exists():
            kept = json.loads(Path(path).read_text())
            if kept["key"] != key:
                raise ValueError(f"{path} belongs to another configuration: {kept['key']}, expected {key}")
            done = kept["folds"]
    for fold in folds:
        if str(fold) in done:
            continue
        loaded = load_data(data, fold=fold)
        run = train_gnn(kind, loaded, "mean" if frozen else readout, settings, device=device)
        seconds = run.seconds
        if frozen:
            run = train_head(run.network, loaded, readout, settings, device=device)
            seconds += run.seconds
        done[str(fold)] = {
            "accuracy": run.test, "validation": run.validation, "epoch": run.epoch, "floored": run.floored,
            "largest_weight": run.largest_weight, "seconds": round(seconds, 2),
        }  # fmt: skip
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), json.dumps({"key": key, "folds": done}, indent=2) + "\n")
        progress(f"{kind} {name} on {key['data']}, fold {fold}: {run.test:.3f} in {seconds:.1f} s")
    rows = [done[str(fold)] for fold in folds]
    return CrossValidation(f"{kind} {name}", tuple(folds), tuple(row["accuracy"] for row in rows), tuple(rows))


def _fingerprint(data: str) -> str:
    """Of the graphs, their labels and their folds."""
    loaded = load_data(data, fold=0)
    parts = (loaded.train, loaded.validation, loaded.test)
    return hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
