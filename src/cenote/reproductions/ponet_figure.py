"""PoNet's figure: the cost of a layer by length, and the runs of the statistical claims."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from cenote.reproductions.base import Finding
from cenote.reproductions.figure import BAD, GOOD
from cenote.reproductions.ponet_cost import DENSE_COST, PONET_COST

CURVES = {PONET_COST: ("PoNet layer", GOOD, "o"), DENSE_COST: ("softmax transformer layer", BAD, "s")}


def draw_ponet(findings: list[Finding], path: Path) -> None:
    """Draw time against tokens on logarithmic axes, and a dot for each run of the other claims.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    rows = [f for f in findings if f.unit == "points of accuracy"]
    figure = Figure(figsize=(11, max(4.0, 0.42 * len(rows) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    for each in findings:
        if each.claim in CURVES:
            lengths = [int(n) for n in re.findall(r"\d+", each.note.partition(" tokens.")[0])]
            label, colour, marker = CURVES[each.claim]
            milliseconds = [per * n / 1000 for per, n in zip(each.values, lengths, strict=True)]
            left.loglog(lengths, milliseconds, color=colour, marker=marker, base=2, label=label)
            left.set_xticks(lengths, [str(n) for n in lengths])
    left.set_yscale("log", base=10)
    left.minorticks_off()
    left.set_xlabel("tokens", fontsize=9)
    left.set_ylabel("milliseconds of one layer, one thread", fontsize=9)
    left.grid(color="0.92")
    left.legend(frameon=False, fontsize=9)
    for number, each in enumerate(rows):
        colours = [GOOD if passed else BAD for passed in each.passed]
        right.scatter(each.values, [number] * len(each.values), c=colours, s=36, alpha=0.8, zorder=3)
    words = ["\n".join(textwrap.wrap(f"{f.claim} Expected: {f.expected}.", 70)) for f in rows]
    right.set_yticks(range(len(rows)), words, fontsize=6.5)
    right.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    right.axvline(0, color="0.7", linewidth=1, zorder=1)
    right.set_xlabel("points of accuracy", fontsize=9)
    right.tick_params(axis="y", length=0)
    for axis in (left, right):
        axis.spines[["right", "top"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=110, format="png")
