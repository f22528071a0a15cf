"""Accuracy of the block's variants, and cost against the side of the map."""

from __future__ import annotations

import textwrap
from pathlib import Path

from cenote.reproductions.base import Finding
from cenote.reproductions.figure import BAD, GOOD
from cenote.reproductions.poolformer_cost import ATTENTION_UNIT, POOL_UNIT


def draw(findings: list[Finding], path: Path) -> None:
    """Draw the digits' findings and the two cost curves to a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    learned = [each for each in findings if each.unit in ("points of accuracy", "% accuracy")]
    for row, each in enumerate(learned):
        left.scatter(
            each.values, [row] * len(each.values), c=[GOOD if ok else BAD for ok in each.passed], s=36, zorder=3
        )
    labels = ["\n".join(textwrap.wrap(f"{each.claim} ({each.unit}; {each.expected})", 60)) for each in learned]
    left.set_yticks(range(len(learned)), labels, fontsize=7)
    left.set_ylim(len(learned) - 0.5, -0.5)
    left.set_xlabel("points, or per cent right", fontsize=8)
    left.grid(axis="x", color="0.92")
    for unit, name in ((POOL_UNIT, "pooling"), (ATTENTION_UNIT, "attention")):
        for each in (one for one in findings if one.unit == unit):
            sides = [16 * 2**number for number in range(len(each.values))]
            right.plot(sides, [value / 1e3 for value in each.values], marker="o", label=name)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("side of the map (cells)", fontsize=8)
    right.set_ylabel("microseconds a cell", fontsize=8)
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["right", "top"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=120, format="png")
