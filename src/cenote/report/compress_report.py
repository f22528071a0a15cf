"""``report.html`` of a comparison of compression methods: one file, no network, light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cenote.files import write_whole
from cenote.report import words
from cenote.report.probe_report import _environment
from cenote.report.svg import Axis, Plot, clip_text

if TYPE_CHECKING:
    from cenote.compress.result import CompressResult, Row

COLOURS = 8
DENSE = "dense"


def write_report(result: CompressResult, path: str | Path) -> Path:
    """Write the report as one HTML file that loads nothing.

    It holds the finding in words, the table (sortable), quality against request time with the front, quality against
    budget, retrieval by length and depth, what does not fit and why, settings and notes.

    Raises:
        ValueError: a result without rows.
    """
    return write_whole(path, render(result))


def render(result: CompressResult) -> str:
    """The report as text; see :func:`write_report`."""
    if not result.rows:
        raise ValueError("a report needs at least one row, got none")
    rows = result.rows
    context = {
        "title": _title(result),
        "sentences": _sentences(result),
        "tiles": _tiles(result),
        "table": [_line(row, rank, result.kept) for rank, row in enumerate(rows)],
        "time": time_chart(rows, int(result.settings.get("request_tokens", 0))),
        "budget": budget_chart(rows),
        "grids": _grids(rows),
        "refused": result.refused,
        "notes": [*result.notes, *_row_notes(rows)],
        "settings": [(key.replace("_", " "), _show(value)) for key, value in result.settings.items()],
        "quality_name": rows[0].quality_name,
    }
    return _environment().get_template("compress.html").render(context)


def time_chart(rows: Sequence[Row], tokens: int) -> Plot | None:
    """Quality against the time of a request, with the front; ``None`` where fewer than two are known."""
    known = [row for row in rows if math.isfinite(row.quality) and row.request_ms > 0]
    if len(known) < 2:
        return None
    low, high = min(row.request_ms for row in known) / 1.3, max(row.request_ms for row in known) * 1.3
    x = Axis(low, high, f"prompt and {tokens} new tokens (ms)", words.quantity, log=True)
    plot = Plot(x, _quality_axis(known), "quality against request time")
    plot.line([(low, 1.0), (high, 1.0)], "level")
    steps: list[tuple[float, float]] = []
    for row in sorted((row for row in known if row.front), key=lambda row: row.request_ms):
        steps += [(row.request_ms, steps[-1][1])] if steps else []
        steps.append((row.request_ms, row.quality))
    if steps:
        plot.line([*steps, (high, steps[-1][1])], "front")
    for row in sorted(known, key=lambda row: row.front):
        css = "point" + (" top" if row.method == DENSE else "") + (" on-front" if row.front else "")
        tip = f"{row.name}\n{_percent(row.quality)} of dense\n{words.number(row.request_ms)} ms" + (
            "\non the front" if row.front else ""
        )
        plot.circle(row.request_ms, row.quality, css, tip, 6 if row.front else 4.5)
    places = [(row.request_ms, row.quality) for row in known]
    first = sorted(known, key=lambda row: not row.front)
    plot.labels([(row.request_ms, row.quality, clip_text(row.name, 30)) for row in first], places)
    return plot


def budget_chart(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Quality against budget, a line a method, and the names of the lines in the order of their colours."""
    series: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.budget is not None and math.isfinite(row.quality):
            series.setdefault(row.method, []).append((row.budget, row))
    shares = sorted({share for points in series.values() for share, _ in points})
    if len(shares) < 2:
        return None
    x = Axis(shares[0] / 1.15, shares[-1] * 1.15, "budget (share kept)", lambda v: f"{v:g}", log=True, ticks=shares)
    plot = Plot(x, _quality_axis([row for points in series.values() for _, row in points]), "quality against budget")
    plot.line([(x.low, 1.0), (x.high, 1.0)], "level")
    for number, (name, points) in enumerate(series.items()):
        css = f"s{number}" if number < COLOURS else "s-rest"
        points = sorted(points, key=lambda point: point[0])
        plot.line([(share, row.quality) for share, row in points], f"series {css}")
        for share, row in points:
            plot.circle(share, row.quality, f"dot {css}", f"{name}\nbudget {share:g}: {_percent(row.quality)}", 4)
    return {"plot": plot, "names": list(series)[:COLOURS]}


def _quality_axis(rows: Sequence[Row]) -> Axis:
    values = [1.0, *(row.quality for row in rows)]
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), 0.01)
    return Axis(max(low - pad, -0.02), high + pad, "quality", lambda v: f"{100 * v:g} %")


def _title(result: CompressResult) -> str:
    if result.kept is None:
        return f"{len(result.rows) - 1} rows against the dense model"
    return f"{result.kept} is kept"


def _sentences(result: CompressResult) -> list[str]:
    rows, settings = result.rows, result.settings
    sentences = [
        f"{settings.get('model')} at a context of {settings.get('context')} tokens; every row was measured on the same "
        "inputs."
    ]
    kept = next((row for row in rows if row.name == result.kept), None)
    if kept is not None:
        sentences.append(
            f"{kept.name} keeps {_percent(kept.quality)} of the dense quality; a token takes "
            f"{_ratio(kept.decode_speedup)} and the prompt {_ratio(kept.prefill_speedup)}."
        )
    best = next((row for row in rows if row.method != DENSE), None)
    if best is not None and best.name != result.kept:
        sentences.append(f"Nearest to dense comes {best.name} with {_percent(best.quality)}.")
    return sentences


def _ratio(speedup: float) -> str:
    """``"1.8 times less time"``."""
    if 0.95 < speedup < 1.05:
        return "as long"
    if speedup > 1:
        return f"{words.number(speedup, 2)} times less time"
    return f"{words.number(1 / speedup, 2)} times as long"


def _row_notes(rows: Sequence[Row]) -> list[str]:
    """What rows say of themselves, rows that say the same together."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            said.setdefault(row.note, []).append(row.name)
    return [f"{', '.join(sorted(names))}: {note}" for note, names in said.items()]


def _tiles(result: CompressResult) -> list[tuple[str, str]]:
    dense = result.dense
    found = "–" if dense.retrieval is None else _percent(dense.retrieval)
    return [
        (words.number(dense.perplexity), "dense perplexity"),
        (found, "facts found by dense"),
        (f"{words.number(dense.prefill_ms)} ms", "dense prompt"),
        (f"{words.number(dense.decode_ms_per_token)} ms", "dense token"),
        (words.quantity(dense.cache_bytes) + "B", "dense cache"),
    ]


def _line(row: Row, rank: int, kept: str | None) -> dict[str, Any]:
    cells: list[tuple[Any, str]] = [
        (row.quality, _percent(row.quality)),
        (row.perplexity, words.number(row.perplexity)),
        (row.agreement, _percent(row.agreement)),
        (row.kl, words.number(row.kl)),
        (row.retrieval, "–" if row.retrieval is None else _percent(row.retrieval)),
        (row.prefill_ms, f"{words.number(row.prefill_ms)} ± {words.number(row.prefill_ms_spread, 2)}"),
        (row.prefill_speedup, words.number(row.prefill_speedup, 2)),
        (row.decode_ms_per_token, f"{words.number(row.decode_ms_per_token)} ± {words.number(row.decode_ms_spread, 2)}"),
        (row.decode_speedup, words.number(row.decode_speedup, 2)),
        (row.peak_bytes, words.quantity(row.peak_bytes)),
        (row.cache_bytes, words.quantity(row.cache_bytes)),
        (row.weight_bytes, words.quantity(row.weight_bytes)),
        (row.density, "–" if row.density is None else _percent(row.density)),
        (row.prefill_density, "–" if row.prefill_density is None else _percent(row.prefill_density)),
        (row.calibration_seconds, words.duration(row.calibration_seconds)),
    ]
    return {
        "rank": rank,
        "row": row,
        "kept": row.name == kept,
        "budget": "–" if row.budget is None else f"{row.budget:g}",
        "cells": [(value if value is not None and math.isfinite(value) else "", text) for value, text in cells],
    }


def _grids(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Retrieval by length and depth, a line a row."""
    grid = rows[0].retrieval_grid
    if not grid:
        return None
    heads = [(length, depth) for length, cells in grid.items() for depth in cells]

    def cell(row: Row, length: str, depth: str) -> tuple[str, float]:
        value = row.retrieval_grid.get(length, {}).get(depth)
        return ("–", 0.0) if value is None else (f"{100 * value:.0f}", round(value, 3))

    return {
        "lengths": [(length, len(cells)) for length, cells in grid.items()],
        "depths": [depth for _, depth in heads],
        "lines": [(row.name, [cell(row, *head) for head in heads]) for row in rows],
    }


def _percent(value: float) -> str:
    return words.score(value, share=True)


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).strip("[]")
