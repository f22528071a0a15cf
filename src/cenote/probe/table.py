"""The ranked table on a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from cenote.probe.result import ProbeResult


def print_table(result: ProbeResult, console: Console | None = None) -> None:
    """Print the rows, best first; a rule separates tie groups."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=150)
    settings = result.settings
    metric = result.rows[0].metric if result.rows else "score"
    table = Table(
        title=f"{settings['backbone']} on {settings['data']}: {metric} on {len(result.targets)} test items",
        title_justify="left",
    )
    for name in (
        "tie",
        "readout",
        "layers",
        "tokens",
        "score",
        "95 % interval",
        "params",
        "MACs",
        "ms",
        "entropy",
        "lr",
        "train s",
    ):
        table.add_column(
            name, justify="left" if name in ("readout", "layers", "tokens") else "right", no_wrap=name == "readout"
        )
    for row, following in zip(result.rows, [*result.rows[1:], None], strict=True):
        rate = (
            ("" if row.regularisation is None else "L-BFGS")
            if row.lr is None
            else f"{row.lr:g}" + (f" x{row.query_factor:g}" if row.query_factor else "")
        )
        table.add_row(
            str(row.tie_group), row.readout + (" *" if row.status == "partial" else ""), row.layers, row.tokens,
            f"{row.score:.4f}", f"{row.ci_low:.4f} {row.ci_high:.4f}", f"{row.params:,}", _short(row.macs),
            "" if not math.isfinite(row.latency_ms) else f"{row.latency_ms:.3f}",
            "" if row.attention_entropy is None else f"{row.attention_entropy:.2f}",
            "" if row.readout == "knn" else rate, f"{row.train_seconds:.1f}",
            end_section=following is not None and following.tie_group != row.tie_group,
        )  # fmt: skip
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False)
    if result.folder is not None:
        console.print(
            f"report: {result.folder / 'report.html'}   best readout: {result.folder / 'best'}", highlight=False
        )


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
