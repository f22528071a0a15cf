"""``report.html`` of a probe: one file, no network, light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from cenote.files import write_whole
from cenote.probe.result import ProbeResult, Row
from cenote.report import charts, figures, words
from cenote.report.gallery import gallery_data
from cenote.report.judged_report import judged_section
from cenote.report.open_set import open_set_section
from cenote.types import JUDGED_TASKS

MAX_CONFUSION_CLASSES, MAX_CLASS_BARS = 100, 100
TIE_COLOURS = 6


def write_report(result: ProbeResult, path: str | Path) -> Path:
    """Write the report of a probe as one HTML file that loads nothing.

    It holds the finding in words, the ranked table (sortable, ties marked, intervals drawn), score against parameters
    and latency with the Pareto front, score by layer, confusion matrix or residuals and calibration of the best
    readout, accuracy by class, what each query attends to on test items, settings and notes. Charts are inline SVG:
    plotly's script alone would weigh 4.8 MB.

    Raises:
        ValueError: a result without rows.
    """
    return write_whole(path, render(result))


def render(result: ProbeResult) -> str:
    """The report as text; see :func:`write_report`."""
    if not result.rows:
        raise ValueError("a report needs at least one row, got none")
    rows, share = result.rows, words.is_share(result.rows[0].metric)
    gallery, left_out = gallery_data(result)
    layer = charts.layer_chart(rows)
    context = {
        "headline": words.headline(rows),
        "metric": rows[0].metric,
        "tiles": _tiles(rows, share),
        "settings": _settings(result.settings),
        "table": _table(rows, share),
        "costs": _costs(rows),
        "layers": {"plot": layer[0], "names": layer[1], "level": layer[2]} if layer else None,
        "best": words.short_names(rows)[0],
        "gallery": gallery,
        "notes": [*result.notes, *left_out],
        "open_set": open_set_section(result.open_set),
        "judged": judged_section(result),
        **_best(result),
    }
    return _environment().get_template("report.html").render(context)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": words.number, "decimals": lambda value: words.score(value, share=False)}
    return environment


def _tiles(rows: Sequence[Row], share: bool) -> list[tuple[str, str]]:
    best = rows[0]
    return [
        (words.score(best.score, share), best.metric),
        (words.quantity(best.params), "parameters"),
        (f"{words.number(best.latency_ms)} ms", "per item"),
        (str(len(rows)), "rows compared"),
        (words.duration(sum(row.train_seconds for row in rows)), "of training"),
    ]


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    def show(value: Any) -> str:
        if isinstance(value, str):
            return value
        return json.dumps(value, default=str, ensure_ascii=False).strip("[]")

    return [(key.replace("_", " "), show(value)) for key, value in settings.items() if value is not None]


def _table(rows: Sequence[Row], share: bool) -> list[dict[str, Any]]:
    """Cells of the ranked table: what is shown, and what is sorted by."""
    lows = [row.ci_low for row in rows if math.isfinite(row.ci_low)]
    highs = [row.ci_high for row in rows if math.isfinite(row.ci_high)]
    low, high = min(lows, default=0.0), max(highs, default=1.0)
    span = high - low or 1.0

    def at(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    table = []
    for rank, row in enumerate(rows, 1):
        bar = (
            [at(v) for v in (row.ci_low, row.score, row.ci_high)]
            if math.isfinite(row.ci_low + row.score + row.ci_high)
            else None
        )
        fit = (
            f"{row.lr:g}"
            if row.lr is not None
            else f"L2 {row.regularisation:g}"
            if row.regularisation is not None
            else "–"
        )
        if row.query_factor not in (None, 1.0):
            fit += f" ×{row.query_factor:g}"
        table.append(
            {
                "row": row,
                "rank": rank,
                "score": words.score(row.score, share),
                "interval": f"{words.score(row.ci_low, share)} to {words.score(row.ci_high, share)}",
                "bar": bar,
                "params": words.quantity(row.params),
                "macs": words.quantity(row.macs),
                "latency": words.number(row.latency_ms),
                "seconds": words.duration(row.train_seconds),
                "fit": fit,
                "fit_value": row.lr if row.lr is not None else row.regularisation,
                "entropy": words.number(row.attention_entropy, 2),
                "tie": min(row.tie_group, TIE_COLOURS),
                "first_of_group": rank > 1 and row.tie_group != rows[rank - 2].tie_group,
            }
        )
    return table


def _costs(rows: Sequence[Row]) -> list[Any]:
    plots = [
        charts.cost_chart(rows, lambda row: row.params, "parameters", words.quantity),
        charts.cost_chart(rows, lambda row: row.latency_ms, "latency per item (ms)", words.number),
    ]
    return [plot for plot in plots if plot is not None]


def _best(result: ProbeResult) -> dict[str, Any]:
    """Figures of the best readout that depend on the task."""
    empty: dict[str, Any] = {
        "confusion": None,
        "pairs": [],
        "calibration": None,
        "class_bars": None,
        "labels": None,
        "residuals": None,
    }
    predictions = result.predictions.get(result.key(result.rows[0]))
    if predictions is None or not predictions.size or result.settings.get("task") in JUDGED_TASKS:
        return empty
    targets, classes = np.asarray(result.targets), result.classes
    if not classes:
        res = figures.residuals(predictions.astype(float), targets)
        return {
            **empty,
            "residuals": {"plot": charts.residual_chart(res), "r2": res.r2, "mae": res.mae, "rmse": res.rmse},
        }
    if targets.ndim == 2:
        calibration = figures.calibration_bins(
            predictions.ravel().astype(float), np.tile(targets > 0.5, (len(predictions), 1)).ravel()
        )
        scores = figures.label_scores(predictions, targets)
        order = np.argsort(np.nan_to_num(scores.average_precision, nan=2.0), kind="stable")[:MAX_CLASS_BARS]
        labels = [
            (
                classes[i],
                *(float(column[i]) for column in (scores.average_precision, scores.precision, scores.recall)),
                int(scores.positives[i]),
            )
            for i in order
        ]
        return {**empty, "calibration": _calibration(calibration, "observed frequency"), "labels": labels}
    matrix = figures.confusion(predictions, targets)
    accuracy, support = figures.per_class_accuracy(matrix), np.bincount(targets, minlength=len(classes))
    order = np.argsort(np.nan_to_num(accuracy, nan=2.0), kind="stable")
    bars = [(classes[i], float(accuracy[i]), int(support[i])) for i in order if support[i]]
    pairs = [(classes[i], classes[j], value) for i, j, value in figures.confused_pairs(matrix)]
    calibration = figures.calibration_bins(*figures.top_confidence(predictions, targets))
    return {
        **empty,
        "confusion": charts.confusion_map(matrix, classes) if len(classes) <= MAX_CONFUSION_CLASSES else None,
        "pairs": pairs,
        "calibration": _calibration(calibration),
        "class_bars": {"bars": bars[:MAX_CLASS_BARS], "left_out": max(0, len(bars) - MAX_CLASS_BARS)},
    }


def _calibration(calibration: figures.Calibration, observed: str = "accuracy") -> dict[str, Any]:
    full = calibration.counts > 0
    weight = calibration.counts[full] / calibration.counts.sum()
    confidence = float((calibration.confidence[full] * weight).sum())
    accuracy = float((calibration.accuracy[full] * weight).sum())
    return {
        "plot": charts.reliability_chart(calibration, observed),
        "observed": observed,
        "ece": calibration.ece,
        "confidence": confidence,
        "share": accuracy,
    }
