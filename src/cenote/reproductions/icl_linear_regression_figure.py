"""The figure of in-context regression: what the heads' circuits look like, and risk against the prompt's length."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cenote.reproductions.base import Finding
from cenote.reproductions.rows_figure import draw_rows


@dataclass(frozen=True)
class Pictured(Finding):
    """A finding that brings what the figure shows.

    Attributes:
        kq, ov: circuits of one run, ``(heads, width, width)``.
        risks: by predictor, the risk at each length, mean over runs.
        lengths: pairs of the prompts.
    """

    kq: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)), repr=False)
    ov: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)), repr=False)
    risks: dict[str, list[float]] = field(default_factory=dict, repr=False)
    lengths: tuple[int, ...] = ()


def draw_circuits(findings: list[Finding], path: Path) -> None:
    """Draw KQ and OV of each head of one run above risk by length; dots a finding where the findings bring neither.

    Raises:
        ImportError: matplotlib is not installed.
    """
    brought = [each for each in findings if isinstance(each, Pictured)]
    shown = next((each for each in brought if len(each.kq)), None)
    curves = next((each for each in brought if each.lengths), None)
    if shown is None or curves is None:
        draw_rows(findings, path)
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    heads = len(shown.kq)
    figure = Figure(figsize=(2.3 * heads, 8), layout="constrained")
    grid = figure.add_gridspec(3, heads, height_ratios=[1, 1, 1.7])
    for row, (name, circuits) in enumerate((("KQ", shown.kq), ("OV", shown.ov))):
        largest = np.abs(circuits).max()
        for head, circuit in enumerate(circuits):
            axis = figure.add_subplot(grid[row, head])
            image = axis.imshow(circuit, cmap="RdBu", vmin=-largest, vmax=largest)
            axis.set_title(f"{name}, head {head + 1}", fontsize=9)
            ticks = [*(f"x{i + 1}" for i in range(len(circuit) - 1)), "y"]
            axis.set_xticks(range(len(circuit)), ticks, fontsize=6)
            axis.set_yticks(range(len(circuit)), ticks, fontsize=6)
        figure.colorbar(image, ax=figure.axes[-1], shrink=0.8).ax.tick_params(labelsize=6)
    axis = figure.add_subplot(grid[2, :])
    for number, (name, risks) in enumerate(curves.risks.items()):
        axis.plot(curves.lengths, risks, "-o" if number < 4 else "--", markersize=3, linewidth=1.2, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(curves.lengths, [str(length) for length in curves.lengths])
    axis.set_xlabel("pairs of the prompt (trained at 40)", fontsize=8)
    axis.set_ylabel("mean squared error", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(color="0.93")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["right", "top"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
