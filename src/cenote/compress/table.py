"""The table of a comparison on a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from cenote.compress.result import CompressResult, Row
from cenote.report.words import duration, number, quantity

WIDE = 118
"""Columns from which everything is shown."""


def print_table(result: CompressResult, console: Console | None = None) -> None:
    """Print the rows, the dense model first, then what does not fit, notes and where the results are."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=150)
    settings = result.settings
    table = Table(
        title=f"{settings['model']}, context {settings['context']}: {result.rows[0].quality_name}", title_justify="left"
    )
    wide = console.width >= WIDE
    heads = [head for head, always in HEADS if wide or always]
    for head in heads:
        table.add_column(
            head, justify="left" if head == "method" else "right", no_wrap=head != "method", overflow="fold"
        )
    for row in result.rows:
        cells = _cells(row)
        style = "bold" if row.name == result.kept else None
        table.add_row(*(cells[head] for head in heads), style=style, end_section=row is result.rows[0])
    console.print(table)
    console.print(
        "times: median of one row; x: dense time over own, measured in turns; * on the front", highlight=False
    )
    for name, why in result.refused:
        console.print(f"does not fit: {name}: {why}", highlight=False, markup=False)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if result.folder is not None:
        kept = next((result.folder / name for name in ("recipe", "model") if (result.folder / name).exists()), None)
        end = "" if kept is None else f"   kept: {result.kept} in {kept}"
        console.print(f"report: {result.folder / 'report.html'}{end}", highlight=False, markup=False)


HEADS = (
    ("method", True), ("quality", True), ("ppl", True), ("agree", False), ("KL", False), ("facts", True),
    ("prompt ms", False), ("x", False), ("token ms", True), ("x ", True), ("peak", False), ("cache", True),
    ("weights", False), ("density", True), ("calibration", False),
)  # fmt: skip
"""Columns, and whether they are shown where there is little room."""


def _cells(row: Row) -> dict[str, str]:
    return {
        "method": row.name + (" *" if row.front else ""),
        "quality": _share(row.quality, 1),
        "ppl": number(row.perplexity),
        "agree": _share(row.agreement),
        "KL": number(row.kl, 2),
        "facts": _share(row.retrieval),
        "prompt ms": number(row.prefill_ms),
        "x": number(row.prefill_speedup, 2),
        "token ms": number(row.decode_ms_per_token),
        "x ": number(row.decode_speedup, 2),
        "peak": quantity(row.peak_bytes),
        "cache": quantity(row.cache_bytes),
        "weights": quantity(row.weight_bytes),
        "density": _share(row.density),
        "calibration": duration(row.calibration_seconds) if row.calibration_seconds > 0.05 else "",
    }


def _share(value: float | None, digits: int = 0) -> str:
    return "" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"
