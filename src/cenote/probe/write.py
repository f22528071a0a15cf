"""The results folder of a probe: settings, states to resume from, table, predictions, report and the best artefact."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cenote.files import write_whole
from cenote.probe.result import SCHEMA_VERSION, ProbeResult

if TYPE_CHECKING:
    from cenote.backbones.base import Backbone
    from cenote.probe.outcome import Outcome


class Folder:
    """Where a run writes.

    Args:
        path: the folder; made if absent.
        settings: everything that determines the run.
        resume: whether states in the folder may be taken up.

    Raises:
        ValueError: the folder holds another configuration, or a finished or interrupted run and ``resume`` is off.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        self.path, self.checkpoint = path, path / "checkpoint"
        self.resuming = resume
        known = path / "settings.json"
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; --out names a folder")
        if known.exists():
            self._compare(json.loads(known.read_text()), json.loads(json.dumps(settings)))
            if not resume and self.checkpoint.exists():
                for file in self.checkpoint.glob("*.safetensors"):
                    file.unlink()
        elif resume:
            raise ValueError(f"nothing to resume in {path}: it has no settings.json")
        elif path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no probe results: choose another --out")
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        write_whole(known, json.dumps(settings, indent=2).encode())

    def _compare(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        if different:
            shown = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} now" for key in different[:3])
            raise ValueError(
                f"{self.path} belongs to another configuration ({shown}): choose another --out or remove it"
            )

    def write(
        self, result: ProbeResult, outcomes: list[Outcome], backbone: Backbone, host: Any, objective: Any
    ) -> ProbeResult:
        """Write everything of a finished or interrupted run; each file appears whole or not at all."""
        from cenote.probe.best import save_best
        from cenote.report import write_report

        result = dataclasses.replace(result, folder=self.path)
        write_results(result, self.path)
        arrays = io.BytesIO()
        named: dict[str, Any] = {
            "targets": result.targets,
            **{k.replace("/", "_"): v for k, v in result.predictions.items()},
        }
        np.savez_compressed(arrays, **named)
        write_whole(self.path / "predictions.npz", arrays.getvalue())
        write_report(result, self.path / "report.html")
        save_best(result, outcomes, backbone, host, objective, self.path / "best")
        if result.open_set is not None:
            result.open_set.save(self.path)
        return result


def write_results(result: ProbeResult, folder: Path) -> None:
    """``results.json`` (a list of rows) and ``results.parquet``; undefined numbers are ``null``."""
    rows = [{"schema": SCHEMA_VERSION, **dataclasses.asdict(row)} for row in result.rows]
    clean = [{k: _defined(v) for k, v in row.items()} for row in rows]
    write_whole(folder / "results.json", json.dumps(clean, indent=2).encode())
    table = io.BytesIO()
    result.frame().to_parquet(table)
    write_whole(folder / "results.parquet", table.getvalue())


def _defined(value: Any) -> Any:
    """Numbers that JSON does not know as ``None``, within a row's further figures too."""
    if isinstance(value, dict):
        return {key: _defined(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
