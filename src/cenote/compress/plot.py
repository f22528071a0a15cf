"""The figure of a comparison."""

from __future__ import annotations

from typing import Any

from cenote.compress.result import DENSE, CompressResult


def plot(result: CompressResult) -> Any:
    """Quality against request time with the front, and against budget, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    time, share = figure.subplots(1, 2, sharey=True)
    front = sorted((row for row in result.rows if row.front), key=lambda row: row.request_ms)
    time.step([row.request_ms for row in front], [row.quality for row in front], where="post", color="0.6", zorder=1)
    for row in result.rows:
        time.scatter(row.request_ms, row.quality, marker="D" if row.method == DENSE else "o", zorder=2)
        time.annotate(row.name, (row.request_ms, row.quality), fontsize=7, xytext=(4, 3), textcoords="offset points")
    tokens = result.settings.get("request_tokens")
    time.set(xlabel=f"prompt and {tokens} new tokens (ms)", ylabel="quality (1 = dense)", xscale="log")
    for method in dict.fromkeys(row.method for row in result.rows if row.budget is not None):
        points = sorted((row.budget, row.quality) for row in result.rows if row.method == method and row.budget)
        share.plot(*zip(*points, strict=True), marker="o", label=method)
    share.axhline(1, color="0.6", linewidth=1)
    share.set(xlabel="budget (share kept)")
    if share.get_legend_handles_labels()[0]:
        share.legend(fontsize=7)
    return figure
