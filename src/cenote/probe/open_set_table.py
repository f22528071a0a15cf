"""The open-set measures on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cenote.probe.open_set_result import OpenSetResult, OpenSetRow


def print_open_set(result: OpenSetResult, console: Console | None = None) -> None:
    """COSTARR of every readout, and the method of largest AUOSCR beside it."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=150)
    table = Table(title="unknown items: COSTARR (all methods are in open_set.csv)", title_justify="left")
    for name in ("readout", "layers", "tokens"):
        table.add_column(name)
    for name in ("accuracy", "AUOSCR", "AUROC", "OOSA", "FPR95", "best AUOSCR"):
        table.add_column(name, justify="right")
    best: dict[str, OpenSetRow] = {}
    for row in result.rows:
        best[row.key] = max(best.get(row.key, row), row, key=lambda each: each.auoscr)
    for row in result.rows:
        if row.method == "costarr":
            top = best[row.key]
            numbers = [f"{v:.4f}" for v in (row.accuracy, row.auoscr, row.auroc, row.oosa, row.fpr95)]
            table.add_row(row.readout, row.layers, row.tokens, *numbers, f"{top.method} {top.auoscr:.4f}")
    console.print(table)
