"""The figures of a probe's report, each from a result or from numbers of :mod:`cenote.report.figures` to SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cenote.probe.result import Row
from cenote.report.figures import Calibration, Residuals, pareto_front
from cenote.report.svg import Axis, Plot, axis_name, clip_text, frame, tag
from cenote.report.words import is_share, quantity, score, short_names

SERIES_COLOURS = 8
RESIDUAL_POINTS = 2000


def score_axis(rows: Sequence[Row], label: str | None = None) -> Axis:
    """An axis for every score and the intervals of the better half: one failure must not flatten the rest."""
    share = is_share(rows[0].metric)
    scores = [row.score for row in rows if np.isfinite(row.score)]
    lows = [row.ci_low for row in rows[: max(1, len(rows) // 2)] if np.isfinite(row.ci_low)]
    highs = [row.ci_high for row in rows if np.isfinite(row.ci_high)]
    low, high = min([*scores, *lows]), max([*scores, *highs])
    pad = max(0.06 * (high - low), 0.005)
    high = min(high + pad, max(1.0, high)) if share else high + pad
    return Axis(low - pad, high, label or rows[0].metric, lambda v: f"{100 * v:g} %" if share else f"{v:g}")


def cost_chart(
    rows: Sequence[Row], cost: Callable[[Row], float], label: str, show: Callable[[float], str]
) -> Plot | None:
    """Score against a cost on a logarithmic axis, with the Pareto front.

    Readouts that cost nothing (nearest neighbours have no parameters) stand at the left border. ``None`` where fewer
    than two have a cost.
    """

    def tick(value: float) -> str:
        return quantity(value) if value >= 1000 else f"{value:g}"

    known = [i for i, row in enumerate(rows) if np.isfinite(cost(row)) and np.isfinite(row.score)]
    positive = [cost(rows[i]) for i in known if cost(rows[i]) > 0]
    if len(known) < 2 or not positive:
        return None
    costs, scores = np.array([cost(rows[i]) for i in known], float), np.array([rows[i].score for i in known], float)
    low, high = min(positive), max(positive)
    zero = bool((costs <= 0).any())
    low, high = low / (4 if zero else 1.6), high * 1.6
    x = Axis(low / 1.3 if zero else low, high, label, tick, log=True)
    plot = Plot(x, score_axis(rows), f"{rows[0].metric} against {label}")
    at = np.where(costs > 0, costs, low)
    if zero:
        ticks = [t for t in x.marks() if t >= min(positive)]
        plot.x = Axis(x.low, x.high, label, lambda v: "0" if v == low else tick(v), log=True, ticks=[low, *ticks])

    names, share = short_names(rows), is_share(rows[0].metric)
    front = pareto_front(costs, scores)
    steps: list[tuple[float, float]] = []
    for i in front:
        if steps:
            steps.append((at[i], steps[-1][1]))
        steps.append((at[i], scores[i]))
    plot.line([*steps, (high, steps[-1][1])], "front")
    for i, k in enumerate(known):
        row = rows[k]
        if np.isfinite(row.ci_low):
            bottom = max(row.ci_low, plot.y.low)
            plot.line([(at[i], bottom), (at[i], row.ci_high)], "whisker")
    best = rows[0].tie_group
    for i, k in sorted(enumerate(known), key=lambda pair: pair[0] in front):
        row = rows[k]
        css = "point" + (" top" if row.tie_group == best else "") + (" on-front" if i in front else "")
        tip = (
            f"{names[k]}\n{score(row.score, share)} ({score(row.ci_low, share)} to {score(row.ci_high, share)})\n"
            f"{label}: {show(costs[i])}" + ("\non the Pareto front" if i in front else "")
        )
        plot.circle(at[i], scores[i], css, tip, 6 if i in front else 4.5)
    plot.labels([(at[i], scores[i], clip_text(names[known[i]], 30)) for i in front], list(zip(at, scores, strict=True)))
    return plot


def layer_chart(rows: Sequence[Row]) -> tuple[Plot, list[str], str | None] | None:
    """Score by layer: a line for each readout tried on several, a level for the best reader of many layers.

    Returns the plot, the names of its lines in the order of their colours, and the name of the level, or ``None``
    where no readout was tried on two layers.
    """
    series: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        if row.layers.lstrip("-").isdigit():
            tokens = len({other.tokens for other in rows if other.readout == row.readout}) > 1
            series.setdefault(row.readout + (f" ({row.tokens})" if tokens else ""), []).append((int(row.layers), row))
    series = {name: sorted(points, key=lambda p: p[0]) for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    layers = sorted({layer for points in series.values() for layer, _ in points})
    used = [row for points in series.values() for _, row in points]
    stacked = next((row for row in rows if "," in row.layers), None)
    shown = sorted([*used, *([stacked] if stacked else [])], key=lambda row: -row.score)
    step = max(1, -(-len(layers) // 14))
    x = Axis(
        layers[0] - 0.3, layers[-1] + 0.3, "hidden state (0 = embeddings)", lambda v: f"{v:g}", ticks=layers[::step]
    )
    share = is_share(rows[0].metric)
    everything = [row.score for row in shown]
    pad = max(0.06 * (max(everything) - min(everything)), 0.005)
    y = Axis(
        min(everything) - pad,
        max(everything) + pad,
        rows[0].metric,
        lambda v: f"{100 * v:.4g} %" if share else f"{v:.4g}",
    )
    plot = Plot(x, y, "score by layer", width=1080, height=340)
    if stacked:
        plot.line([(x.low, stacked.score), (x.high, stacked.score)], "level")
    for k, (name, points) in enumerate(series.items()):
        css = f"s{k % SERIES_COLOURS}" if k < SERIES_COLOURS else "s-rest"
        plot.line([(layer, row.score) for layer, row in points], f"series {css}")
        for layer, row in points:
            interval = f"{score(row.ci_low, share)} to {score(row.ci_high, share)}"
            tip = f"{name}\nlayer {layer}: {score(row.score, share)} ({interval})"
            plot.circle(layer, row.score, f"dot {css}", tip, 4)
    return plot, list(series)[:SERIES_COLOURS], stacked.readout if stacked else None


def reliability_chart(calibration: Calibration, observed: str = "accuracy") -> Plot:
    """Accuracy (or what ``observed`` calls it) in each bin of confidence; bars are as opaque as their bin is full."""
    axis = {"low": 0.0, "high": 1.0, "show": lambda v: f"{100 * v:.0f} %", "ticks": (0, 0.2, 0.4, 0.6, 0.8, 1.0)}
    plot = Plot(Axis(label="confidence", **axis), Axis(label=observed, **axis), "reliability", width=400, height=380)  # type: ignore[arg-type]
    fullest = max(calibration.counts.max(), 1)
    for i, count in enumerate(calibration.counts):
        if not count:
            continue
        low, high = calibration.edges[i], calibration.edges[i + 1]
        accuracy, confidence = calibration.accuracy[i], calibration.confidence[i]
        tip = (
            f"confidence {100 * low:.0f} to {100 * high:.0f} %: {count} predictions\n"
            f"mean confidence {100 * confidence:.1f} %, {observed} {100 * accuracy:.1f} %"
        )
        # A whole bar as the target of the pointer, above it the visible one and the gap to the mean confidence.
        plot.rect(low, high, 0, accuracy, f"bin f{min(3, int(4 * (count / fullest) ** 0.5))}", tip)
        plot.rect(low, high, accuracy, confidence, "gap", tip)
    plot.line([(0, 0), (1, 1)], "diagonal")
    return plot


def confusion_map(matrix: np.ndarray, classes: Sequence[str]) -> Markup:
    """The confusion matrix as a heat map of shares of the true class; empty cells are not drawn."""
    count = len(classes)
    cell = max(7.0, min(52.0, 440 / count))
    font = min(12.0, cell * 0.95)
    names = [clip_text(name, 18) for name in classes]
    room = max(map(len, names)) * font * 0.62
    slanted = room > cell - 2
    left, top = 26 + room, 30 + (room if slanted else font)
    size = cell * count
    parts = [
        tag("rect", "frame", x=left, y=top, width=size, height=size),
        axis_name("predicted", left + size / 2, 14),
        axis_name("true", 13, top + size / 2, upright=True),
    ]
    for k, name in enumerate(names):
        middle, style = (k + 0.5) * cell, f"font-size:{font:.1f}px"
        parts.append(
            tag("text", "tick", name, style=style, x=left - 6, y=top + middle + font * 0.35, text_anchor="end")
        )
        place = f"translate({left + middle + (font * 0.35 if slanted else 0):.1f} {top - 6:.1f})"
        turn, anchor = (" rotate(-90)", "start") if slanted else ("", "middle")
        parts.append(tag("text", "tick", name, style=style, transform=place + turn, text_anchor=anchor))
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for i, j in zip(*np.nonzero(matrix), strict=True):
        value, x, y = float(share[i, j]), float(left + j * cell), float(top + i * cell)
        tip = f"true {classes[i]}, predicted {classes[j]}\n{100 * value:.1f} % of the true class ({matrix[i, j]})"
        # The square root keeps rare mistakes visible.
        shade = {"fill_opacity": f"{0.12 + 0.88 * value**0.5:.2f}", "data_tip": tip}
        side: dict[str, Any] = {"width": cell - 1, "height": cell - 1}
        parts.append(tag("rect", "right" if i == j else "wrong", x=x + 0.5, y=y + 0.5, **side, **shade))
        if cell >= 26 and value >= 0.005:
            css = "value on-dark" if value > 0.3 else "value on-light"
            parts.append(
                tag("text", css, f"{100 * value:.0f}", x=x + cell / 2, y=y + cell / 2 + 4, text_anchor="middle")
            )
    width, height = left + size + 6, top + size + 6
    return Markup(frame("plot confusion", width, height, width, "confusion matrix", parts))


def residual_chart(res: Residuals) -> Plot:
    """Residual (target less prediction) against prediction; at most 2000 points, evenly spaced."""
    keep = np.linspace(0, len(res.predicted) - 1, min(len(res.predicted), RESIDUAL_POINTS)).astype(int)
    predicted, error = res.predicted[keep], (res.target - res.predicted)[keep]
    low, high = float(predicted.min()), float(predicted.max())
    reach = 1.08 * max(float(np.abs(error).max()), 1e-12)
    pad = 0.04 * (high - low) or 0.5
    plot = Plot(
        Axis(low - pad, high + pad, "prediction", lambda v: f"{v:.4g}"),
        Axis(-reach, reach, "target less prediction", lambda v: f"{v:.4g}"),
        "residuals",
        width=1080,
        height=380,
    )
    plot.line([(plot.x.low, 0), (plot.x.high, 0)], "level")
    for p, e in zip(predicted, error, strict=True):
        plot.circle(float(p), float(e), "cloud", radius=3)
    return plot
