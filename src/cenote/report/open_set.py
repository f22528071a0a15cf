"""The open-set part of a probe's report: OSCR curves of the best readout, and every readout's measures."""

from __future__ import annotations

import math
from typing import Any

from cenote.probe.open_set_result import OpenSetResult, OpenSetRow
from cenote.report.svg import Axis, Plot

NAMES = {
    "costarr": "COSTARR", "msp": "MSP", "maxlogit": "MaxLogit", "energy": "Energy", "knn": "KNN", "nnguide": "NNGuide",
    "vim": "ViM", "ghost": "GHOST", "postmax": "PostMax",
}  # fmt: skip
SERIES = 8
"""Lines of the figure: the colours there are."""


def open_set_section(result: OpenSetResult | None) -> dict[str, Any] | None:
    """What the template shows, or ``None`` for a probe without unknown items."""
    if result is None:
        return None
    areas = {row.method: row.auoscr for row in result.rows if row.key == result.best}
    shown = ["costarr", *sorted((m for m in result.curves if m != "costarr"), key=lambda m: -areas[m])][:SERIES]
    readouts: dict[str, dict[str, OpenSetRow]] = {}
    for row in result.rows:
        readouts.setdefault(row.key, {})[row.method] = row
    lines = []
    for rows in readouts.values():
        own = rows["costarr"]
        best = max(rows.values(), key=lambda row: row.auoscr)
        values = [own.accuracy, own.auoscr, own.auroc, own.oosa, own.fpr95]
        others = [rows[m].auoscr if m in rows else math.nan for m in ("maxlogit", "msp", "knn")]
        lines.append(
            {
                "name": own.readout,
                "where": f"{own.layers}, {own.tokens}",
                "cells": [_per_cent(v) for v in [*values, *others]],
                "best": f"{NAMES[best.method]} {_per_cent(best.auoscr)}",
            }
        )
    return {
        "note": result.note,
        "best": result.best.split(" | ")[0],
        "plot": oscr_chart(result, shown),
        "names": [NAMES[m] for m in shown],
        "lines": lines,
    }


def oscr_chart(result: OpenSetResult, methods: list[str]) -> Plot:
    """Correct classification rate against false positive rate, a line a method."""
    top = max(float(result.curves[m][1].max()) for m in methods)
    share = {"low": 0.0, "show": lambda v: f"{100 * v:.0f} %"}
    plot = Plot(
        Axis(high=1.0, label="unknowns accepted", ticks=(0, 0.2, 0.4, 0.6, 0.8, 1.0), **share),  # type: ignore[arg-type]
        Axis(high=min(1.0, 1.05 * top), label="knowns accepted and right", **share),  # type: ignore[arg-type]
        "open-set classification rate",
        width=1080,
        height=380,
    )
    for k, method in reversed(list(enumerate(methods))):
        plot.line(list(zip(*result.curves[method].tolist(), strict=True)), f"series s{k}")
    return plot


def _per_cent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"
