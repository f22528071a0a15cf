"""What a comparison returns and writes: one row a method and budget."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cenote.files import write_whole
from cenote.report.figures import pareto_front

SCHEMA_VERSION = 1
QUALITY = "share of dense kept (the lower of perplexity and retrieval)"
QUALITY_TEXT = "share of dense kept (perplexity)"
DENSE = "dense"
WEIGHTS = ("rsq", "gptq", "rtn")
"""Methods that change weights; all others are recipes."""


@dataclass(frozen=True)
class Row:
    """One line of the table, and one object of ``results.json``. Numbers that were not measured are ``None``.

    Attributes:
        method: name of the recipe or weight method; ``"dense"`` for the model itself.
        spec: the same with its settings at the longest context, as ``create_recipe`` takes it.
        budget: share of keys, tokens or bits kept; ``None`` where the method has settings of its own.
        quality: ``min(dense perplexity / perplexity, retrieval / dense retrieval)``, 1 for the dense model; retrieval
            counts where the dense model answers at least a fifth.
        quality_name: which of these it is.
        perplexity: of the text's last tokens, decoded one by one.
        agreement: share of those tokens at which method and dense model put the same token first.
        kl: mean ``KL(dense || method)`` of the next-token distributions in nats.
        retrieval: share of planted facts answered right in every token, over all lengths and depths.
        retrieval_grid: the same by length and depth.
        prefill_ms: median time of a prompt of the longest context, batch 1.
        prefill_ms_spread: interquartile range.
        decode_ms_per_token: median time of a token behind it.
        decode_ms_spread: interquartile range.
        dense_prefill_ms, dense_decode_ms: the same of the dense model, its runs taking turns with this method's.
        request_ms: one prompt and ``request_tokens`` new tokens: the dense row's time by this method's ratios to it, so
            that a machine that slows down during the run favours nobody.
        peak_bytes: weights and the most memory that a prompt and a few tokens need beside them.
        cache_bytes: keys, values and the method's state held behind that prompt.
        weight_bytes: weights as the method stores them.
        density: share of the key positions that new tokens attend to, over layers and heads.
        prefill_density: the same of the prompt's tokens.
        calibration_seconds: time to learn or quantise.
        front: on the front of quality and request time. Weight methods, which run on dequantised weights here and so
            take the dense model's time, are not.
        note: what a reader must know.
    """

    method: str
    spec: str
    budget: float | None
    quality: float
    quality_name: str
    perplexity: float
    agreement: float
    kl: float
    retrieval: float | None
    retrieval_grid: dict[str, dict[str, float]]
    prefill_ms: float
    prefill_ms_spread: float
    decode_ms_per_token: float
    decode_ms_spread: float
    dense_prefill_ms: float
    dense_decode_ms: float
    request_ms: float
    peak_bytes: int
    cache_bytes: int
    weight_bytes: int
    density: float | None
    prefill_density: float | None
    calibration_seconds: float
    front: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Method and budget."""
        return self.method if self.budget is None else f"{self.method} {self.budget:g}"

    @property
    def changes_weights(self) -> bool:
        """Whether it is a weight method."""
        return self.method.partition("(")[0] in WEIGHTS

    @property
    def decode_speedup(self) -> float:
        """Dense over own time a token, measured in turns."""
        return self.dense_decode_ms / self.decode_ms_per_token

    @property
    def prefill_speedup(self) -> float:
        """Dense over own time of the prompt, measured in turns."""
        return self.dense_prefill_ms / self.prefill_ms


@dataclass(frozen=True)
class CompressResult:
    """The whole outcome of a comparison.

    Attributes:
        rows: the dense model first, then by quality, best first.
        settings: everything that determines the run, JSON-able.
        kept: name of the row whose recipe is kept, or ``None``.
        refused: methods that do not fit the model, and why.
        notes: things a reader must know.
        folder: where it was written.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    kept: str | None = None
    refused: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())
    folder: Path | None = None

    @property
    def dense(self) -> Row:
        """The row of the model itself."""
        return next(row for row in self.rows if row.method == DENSE)

    def frame(self) -> pd.DataFrame:
        """The table; retrieval has a column a length."""
        table = []
        for row in self.rows:
            fields = dataclasses.asdict(row)
            grid = fields.pop("retrieval_grid")
            fields |= {f"retrieval@{length}": float(np.mean(list(cells.values()))) for length, cells in grid.items()}
            table.append(fields)
        return pd.DataFrame(table)

    def plot(self) -> Any:
        """A matplotlib figure: quality against request time with the front, and quality against budget."""
        from cenote.compress.plot import plot

        return plot(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``results.json``, ``results.csv``, ``results.parquet``, ``summary.json`` and ``report.html``."""
        from cenote.report.compress_report import write_report

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "results.json", json.dumps([row_json(row) for row in self.rows], indent=2) + "\n")
        frame, parquet = self.frame(), io.BytesIO()
        frame.to_parquet(parquet)
        write_whole(folder / "results.parquet", parquet.getvalue())
        write_whole(folder / "results.csv", frame.to_csv(index=False))
        summary = {
            "schema": SCHEMA_VERSION, "kept": self.kept, "refused": dict(self.refused), "notes": list(self.notes),
            "settings": self.settings,
        }  # fmt: skip
        write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(self, folder / "report.html")
        return folder


def row_json(row: Row) -> dict[str, Any]:
    """A row as ``results.json`` holds it; undefined numbers are ``None``."""
    return {"schema": SCHEMA_VERSION, **{key: _defined(value) for key, value in dataclasses.asdict(row).items()}}


def row_from_json(read: dict[str, Any]) -> Row:
    """The row that :func:`row_json` wrote; undefined numbers come back as NaN where a number is expected."""
    values: dict[str, Any] = {}
    for each in dataclasses.fields(Row):
        if each.name in read:
            value = read[each.name]
            values[each.name] = math.nan if value is None and each.type == "float" else value
    return Row(**values)


def ranked(rows: list[Row]) -> tuple[Row, ...]:
    """The dense model, then the others by quality and time, each marked if it is on the front."""
    cost = np.array([math.nan if row.changes_weights else row.request_ms for row in rows], float)
    front = set(pareto_front(cost, np.array([row.quality for row in rows], float)))
    marked = [dataclasses.replace(row, front=number in front) for number, row in enumerate(rows)]
    return tuple(sorted(marked, key=lambda row: (row.method != DENSE, -_low(row.quality), row.request_ms)))


def _low(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
