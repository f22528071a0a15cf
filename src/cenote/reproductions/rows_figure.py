"""A figure with one panel a unit and one row a finding, so that what is compared shares an axis."""

from __future__ import annotations

import textwrap
from pathlib import Path

from cenote.reproductions.base import Finding
from cenote.reproductions.figure import BAD, GOOD, draw_findings


def draw_rows(findings: list[Finding], path: Path) -> None:
    """Draw the statistical findings to a PNG file: a dot a run, coloured by whether it satisfies the claim.

    Findings of one unit share a panel. Findings of a single value take part where another of their unit has several;
    the rest are left to the table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    several = {f.unit for f in findings if len(f.values) > 1}
    panels = {
        unit: [f for f in findings if f.unit == unit]
        for unit in dict.fromkeys(f.unit for f in findings)
        if unit in several
    }
    if not panels:
        draw_findings(findings, path)
        return
    rows = [len(group) for group in panels.values()]
    figure = Figure(figsize=(9, 0.75 * len(panels) + 0.55 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[0.8 + n for n in rows])[:, 0]
    for axis, (unit, group) in zip(axes, panels.items(), strict=True):
        for row, each in enumerate(group):
            colours = [GOOD if passed else BAD for passed in each.passed]
            axis.scatter(each.values, [row] * len(each.values), c=colours, s=42, alpha=0.8, zorder=3)
            axis.plot([each.measured] * 2, [row - 0.3, row + 0.3], color="0.35", linewidth=1.4, zorder=2)
        axis.set_yticks(range(len(group)), [_label(each) for each in group], fontsize=8)
        axis.set_ylim(len(group) - 0.5, -0.5)
        axis.margins(x=0.12)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["left", "right", "top"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel(unit or "value", fontsize=8)
    figure.suptitle(
        "a dot is a run, green where it satisfies the claim; the bar is their mean", fontsize=8, color="0.35"
    )
    figure.savefig(path, dpi=120, format="png")


def _label(each: Finding) -> str:
    words = f"{each.claim} Expected: {each.expected}."
    return "\n".join(textwrap.wrap(words.replace("$", r"\$"), 62))
