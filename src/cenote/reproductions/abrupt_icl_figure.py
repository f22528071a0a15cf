"""The figure of the abrupt transition: measures against steps, the reduced model over the loss, data dependence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cenote.reproductions.base import Finding
from cenote.reproductions.rows_figure import draw_rows

NAMES = {
    "accuracy": "accuracy, fresh classes",
    "cla": "a label of the context (CLA)",
    "ila1": "label to its item (ILA1)",
    "tila2": "target to its label (TILA2)",
    "tla2": "target to labels (TLA2)",
}


@dataclass(frozen=True)
class Curves(Finding):
    """A finding that brings what the figure shows.

    Attributes:
        steps: at which networks were evaluated.
        measures: of one run of the transition, by name ``(evaluations,)``.
        fits: the phenomenological model's loss at those steps, by name.
        pairs, labels: N and L.
        others: by setting, steps and accuracies on fresh classes and from memory.
    """

    steps: tuple[int, ...] = ()
    measures: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    fits: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    pairs: int = 1
    labels: int = 1
    others: dict[str, tuple[tuple[int, ...], np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)


def draw_curves(findings: list[Finding], path: Path) -> None:
    """Draw measures, loss with the reduced model, and data dependence; dots a finding where no finding brings curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = next((each for each in findings if isinstance(each, Curves)), None)
    if shown is None:
        draw_rows(findings, path)
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    for name, words in NAMES.items():
        top.plot(shown.steps, shown.measures[name], label=words, linewidth=2 if name == "accuracy" else 1.2)
    top.set_ylabel("share", fontsize=8)
    top.set_title("One run: the context's labels first, then both attentions and the accuracy at once", fontsize=9)
    middle.plot(shown.steps, shown.measures["loss"], "k.", label="measured loss, fresh classes")
    for name, curve in shown.fits.items():
        middle.plot(shown.steps, curve, linewidth=1.2, label=name)
    for level, words in ((math.log(shown.labels), "ln L"), (math.log(shown.pairs), "ln N")):
        middle.axhline(level, color="0.8", linewidth=0.8)
        middle.text(0, level, words, fontsize=7, color="0.5", va="bottom")
    middle.set_ylabel("nats", fontsize=8)
    middle.set_title("The phenomenological model fitted to the loss", fontsize=9)
    for number, (name, (steps, context, memory)) in enumerate(shown.others.items()):
        bottom.plot(steps, context, color=f"C{number}", label=f"{name}: fresh classes")
        bottom.plot(steps, memory, "--", color=f"C{number}", label=f"{name}: from memory")
    bottom.set_ylabel("accuracy", fontsize=8)
    bottom.set_title("What the stream shows decides what is learnt", fontsize=9)
    bottom.set_xlabel("steps of plain SGD", fontsize=8)
    for axis in (top, middle, bottom):
        axis.legend(fontsize=7, frameon=False)
        axis.tick_params(labelsize=7)
        axis.grid(color="0.94")
        axis.spines[["right", "top"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
