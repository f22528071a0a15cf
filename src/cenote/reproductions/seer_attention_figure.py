"""SeerAttention's figure: perplexity by density for every way of choosing blocks, and the runs of the comparisons."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from cenote.reproductions.base import Finding
from cenote.reproductions.figure import BAD, GOOD

CURVE = "Perplexity grows as density falls with {name} in {where}."
COLOURS = {
    "the learned gate": GOOD,
    "mean-pooled q.k": "#4477aa",
    "Quest bounds": "#aa7744",
    "the nearest blocks": "0.5",
}


def draw_seer(findings: list[Finding], path: Path) -> None:
    """One panel a model with the loss of perplexity by density, and a dot for each run of the comparisons.

    Random blocks are left out of the panels: they would hide the rest.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    curves: dict[str, list[tuple[str, Finding]]] = {}
    for each in findings:
        match = re.fullmatch(
            CURVE.format(name="(.+)", where="(.+)").replace(".", r"\.").replace(r"(\.+)", "(.+?)"), each.claim
        )
        if match and match[1] in COLOURS:
            curves.setdefault(match[2], []).append((match[1], each))
    rows = [f for f in findings if f.unit == "% lower perplexity"]
    figure = Figure(figsize=(5 * (len(curves) + 1), max(4.0, 0.4 * len(rows) + 1)), layout="constrained")
    axes = figure.subplots(1, len(curves) + 1, squeeze=False)[0]
    for axis, (where, lines) in zip(axes, curves.items(), strict=False):
        for name, each in lines:
            ratios = [float(n) for n in re.findall(r"\d\.\d+", each.note)]
            axis.plot(ratios, each.values, color=COLOURS[name], marker="o", label=name)
        axis.set_title(where, fontsize=9)
        axis.set_xlabel("density", fontsize=9)
        axis.set_ylabel("perplexity, % above dense", fontsize=9)
        axis.set_yscale("symlog", linthresh=1)
        axis.axhline(0, color="0.7", linewidth=1)
        axis.grid(color="0.92")
        axis.invert_xaxis()
        axis.legend(frameon=False, fontsize=8)
    last = axes[-1]
    for number, each in enumerate(rows):
        last.scatter(
            each.values, [number] * len(each.values), s=36, alpha=0.8, c=[GOOD if p else BAD for p in each.passed]
        )
    last.set_yticks(range(len(rows)), ["\n".join(textwrap.wrap(each.claim, 60)) for each in rows], fontsize=6.5)
    last.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    last.set_xscale("symlog", linthresh=1)
    last.axvline(0, color="0.7", linewidth=1)
    last.set_xlabel("% lower perplexity than the rule", fontsize=9)
    for axis in axes:
        axis.spines[["right", "top"]].set_visible(False)
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=110, format="png")
