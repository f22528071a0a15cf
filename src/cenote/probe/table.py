"""The ranked table on a terminal."""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cenote.probe.result import ProbeResult, Row

UNITS = {"verification": "pairs", "similarity": "pairs", "retrieval": "queries", "clustering": "items"}
"""What a judged task counts; the others count test items."""
FIGURES = {"verification": "eer", "similarity": "pearson", "retrieval": "recall@100", "clustering": "homogeneity"}
"""The further figure of a judged task that is shown where there is room."""
DISPENSABLE = ("train s", "entropy", "ms", "MACs", "lr", "params", "tokens", "layers", "95 % interval")
"""Columns in the order in which they go where the terminal is narrow, after the further figure."""
LEFT = ("readout", "layers", "tokens")
NARROWEST_READOUT = 20


class Column(NamedTuple):
    """Heading and cells of a column."""

    name: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(map(len, (self.name, *self.cells)))


def print_table(result: ProbeResult, console: Console | None = None) -> None:
    """Print the rows, best first; a rule separates tie groups.

    Names of readouts go over several lines and columns go altogether before a number is cut.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=150)
    settings, rows = result.settings, result.rows
    task = str(settings.get("task"))
    metric = rows[0].metric if rows else "score"
    table = Table(
        title=f"{settings['backbone']} on {settings['data']}: {metric} on {len(result.targets)} "
        f"{UNITS.get(task, 'test items')}",
        title_justify="left",
    )
    columns = _fitting(_columns(rows, FIGURES.get(task)), console.width, FIGURES.get(task))
    for column in columns:
        readout = column.name == "readout"
        table.add_column(
            column.name, justify="left" if column.name in LEFT else "right", no_wrap=not readout,
            overflow="fold", min_width=None if readout else column.width,
        )  # fmt: skip
    for place, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        last = place + 1 == len(rows) or rows[place + 1].tie_group != rows[place].tie_group
        table.add_row(*cells, end_section=last)
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)
    if result.folder is not None:
        console.print(
            f"report: {result.folder / 'report.html'}   best readout: {result.folder / 'best'}", highlight=False
        )


def _columns(rows: tuple[Row, ...], figure: str | None) -> list[Column]:
    columns = [
        Column("tie", [str(row.tie_group) for row in rows]),
        Column("readout", [row.readout + (" *" if row.status == "partial" else "") for row in rows]),
        Column("layers", [row.layers for row in rows]),
        Column("tokens", [row.tokens for row in rows]),
        Column("score", [f"{row.score:.4f}" for row in rows]),
        Column("95 % interval", [f"{row.ci_low:.4f} {row.ci_high:.4f}" for row in rows]),
        Column("params", [f"{row.params:,}" for row in rows]),
        Column("MACs", [_short(row.macs) for row in rows]),
        Column("ms", [f"{row.latency_ms:.3f}" if math.isfinite(row.latency_ms) else "" for row in rows]),
        Column("entropy", ["" if row.attention_entropy is None else f"{row.attention_entropy:.2f}" for row in rows]),
        Column("lr", [_rate(row) for row in rows]),
        Column("train s", [f"{row.train_seconds:.1f}" for row in rows]),
    ]
    if figure is not None and all(figure in row.extra for row in rows):
        columns.insert(6, Column(figure, [f"{row.extra[figure]:.4f}" for row in rows]))
    return columns


def _fitting(columns: list[Column], width: int, figure: str | None) -> list[Column]:
    """Without as many of the dispensable columns as it takes to leave every number whole."""

    def needed(some: list[Column]) -> int:
        least = (min(c.width, NARROWEST_READOUT) if c.name == "readout" else c.width for c in some)
        return sum(3 + cells for cells in least) + 1  # a rule and two spaces a column

    for name in (figure, *DISPENSABLE):
        if needed(columns) <= width:
            break
        columns = [column for column in columns if column.name != name]
    return columns


def _rate(row: Row) -> str:
    if row.readout == "knn":
        return ""
    if row.lr is None:
        return "" if row.regularisation is None else "L-BFGS"
    return f"{row.lr:g}" + (f" x{row.query_factor:g}" if row.query_factor else "")


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
