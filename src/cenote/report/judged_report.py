"""The part of a probe's report that belongs to judged tasks: further figures, detection curves, cosines of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from cenote.ops.verification import detection_curve, equal_error_rate, min_detection_cost
from cenote.probe.result import ProbeResult, Row
from cenote.report import words
from cenote.report.charts import SERIES_COLOURS
from cenote.report.svg import Axis, Plot
from cenote.types import JUDGED_TASKS

DET_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
MOST_ALARMS, MOST_MISSES = 0.65, 0.95  # operating points of a rare target lie where many are missed
DET_ROWS, CURVE_POINTS, CLOUD_POINTS = 5, 400, 1500


def judged_section(result: ProbeResult) -> dict[str, Any] | None:
    """What the template shows, or ``None`` for a probe of labelled data."""
    if result.settings.get("task") not in JUDGED_TASKS:
        return None
    names = words.short_names(result.rows)
    figures = list(dict.fromkeys(name for row in result.rows for name in row.extra))
    lines = [
        {"name": name, "cells": [words.number(row.extra.get(figure)) for figure in figures]}
        for name, row in zip(names, result.rows, strict=True)
    ]
    task = result.settings["task"]
    shown = [row for row in result.rows if result.key(row) in result.predictions]
    return {
        "task": task,
        "figures": [figure.replace("_", " ") for figure in figures],
        "lines": lines if figures else [],
        "det": det_chart(result, shown[:DET_ROWS]) if task == "verification" and shown else None,
        "det_names": names[:DET_ROWS],
        "p_target": result.settings.get("p_target"),
        "cloud": cloud_chart(result, shown[0]) if task == "similarity" and shown else None,
        "best": names[0],
    }


def det_chart(result: ProbeResult, rows: Sequence[Row]) -> Plot:
    """Missed targets against false alarms, both on the scale of normal deviates, where the curve of two normal
    distributions of scores is a straight line.

    The open circle is where both rates are equal, the dot where the detection cost is least. Seeds are readouts of
    their own, whose scores have no common scale: the first is drawn.
    """
    same = result.targets > 0.5
    curves = []
    for row in rows:
        scores = result.predictions[result.key(row)][0]
        curves.append((row, detection_curve(scores, same), scores))
    floor = 0.5 / max(1, int(min(same.sum(), (~same).sum())))
    low = max(min(floor, 0.01), 0.0005)
    ticks = [float(norm.ppf(tick)) for tick in DET_TICKS if tick >= low]

    def show(deviate: float) -> str:
        return f"{100 * norm.cdf(deviate):.3g} %"

    ends = [float(norm.ppf(rate)) for rate in (low, MOST_ALARMS, MOST_MISSES)]
    plot = Plot(
        Axis(ends[0], ends[1], "false alarms", show, ticks=[tick for tick in ticks if tick < ends[1]]),
        Axis(ends[0], ends[2], "misses", show, ticks=ticks), "detection error trade-off", width=560, height=560,
    )  # fmt: skip
    plot.line([(ends[0], ends[0]), (ends[1], ends[1])], "level")

    def place(alarm: Any, miss: Any) -> tuple[Any, Any]:
        return norm.ppf(np.clip(alarm, low, MOST_ALARMS)), norm.ppf(np.clip(miss, low, MOST_MISSES))

    p_target = float(result.settings.get("p_target", 0.01))
    for number, (row, curve, scores) in enumerate(curves):
        css = f"s{number % SERIES_COLOURS}"
        inside = (curve.false_accept <= MOST_ALARMS) & (curve.false_reject <= MOST_MISSES)
        alarm, miss = place(curve.false_accept[inside], curve.false_reject[inside])
        kept = np.unique(np.linspace(0, len(alarm) - 1, min(len(alarm), CURVE_POINTS)).round().astype(int))
        plot.line([(float(alarm[i]), float(miss[i])) for i in kept], f"series {css}")
        eer, cost = equal_error_rate(scores, same), min_detection_cost(scores, same, p_target)
        name = words.short_names(result.rows)[list(result.rows).index(row)]
        x, y = place(eer, eer)
        plot.circle(float(x), float(y), f"dot hollow {css}", f"{name}\nequal error rate {100 * eer:.2f} %")
        at = int(np.searchsorted(curve.thresholds, cost.threshold))
        x, y = place(curve.false_accept[at], curve.false_reject[at])
        tip = f"{name}\nminDCF {cost.cost:.3f} at P(target) = {p_target:g}"
        plot.circle(float(x), float(y), f"dot {css}", tip, 4)
    return plot


def cloud_chart(result: ProbeResult, row: Row) -> Plot:
    """Cosine of each pair against its judged degree; of many pairs, some drawn by a fixed seed."""
    cosines, degrees = result.predictions[result.key(row)][0], result.targets
    shown = np.random.default_rng(0).permutation(len(degrees))[:CLOUD_POINTS]

    def axis(values: np.ndarray, label: str) -> Axis:
        pad = max(0.04 * float(values.max() - values.min()), 1e-3)
        return Axis(float(values.min()) - pad, float(values.max()) + pad, label, lambda v: f"{v:g}")

    plot = Plot(axis(degrees, "judged degree"), axis(cosines, "cosine"), "cosine against judged degree")
    for i in shown:
        plot.circle(float(degrees[i]), float(cosines[i]), "cloud", radius=2.5)
    return plot
