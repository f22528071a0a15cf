"""HyLRA's figure: how much of each layer's choice the other layers share, with the plan made of it."""

from __future__ import annotations

import re
from pathlib import Path

from cenote.reproductions.base import Finding
from cenote.reproductions.rows_figure import draw_rows


def matrix_note(overlap: list[list[float]], roles: list[str]) -> str:
    """Words of a note that :func:`draw_hylra` can read a matrix and a plan from."""
    rows = " / ".join(" ".join(f"{value:.2f}" for value in row) for row in overlap)
    return f"Overlap by rows: {rows}. Plan: {' '.join(roles)}."


def draw_hylra(findings: list[Finding], path: Path) -> None:
    """Draw the overlap of the layers of every model with each layer's source marked, and the plan along the axis.

    Findings without a matrix go to the table; where there is none at all, a dot is drawn for each run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    pattern = re.compile(r"Overlap by rows: ([\d. /]+)\. Plan: ([\w ]+)\.")
    read = [(each.claim, found) for each in findings if (found := pattern.search(each.note))]
    if not read:
        draw_rows(findings, path)
        return
    figure = Figure(figsize=(5.2 * len(read), 5.2), layout="constrained")
    for axis, (claim, found) in zip(figure.subplots(1, len(read), squeeze=False)[0], read, strict=True):
        matrix = [[float(value) for value in row.split()] for row in found[1].split(" / ")]
        roles = found[2].split()
        layers = range(len(roles))
        picture = axis.imshow([[v if j >= i else float("nan") for j, v in enumerate(r)] for i, r in enumerate(matrix)],
                              vmin=0, vmax=1, cmap="viridis")  # fmt: skip
        for i in layers:
            for j in layers:
                if i < j:
                    axis.text(j, i, f"{matrix[i][j]:.2f}", ha="center", va="center", fontsize=7, color="w")
        sources = [int(role) if role.isdigit() else layer for layer, role in enumerate(roles)]
        axis.scatter(layers, sources, s=420, facecolors="none", edgecolors="#e8632a", linewidths=2)
        axis.set_xticks(
            layers, [f"{n}\n{'reuse' if role.isdigit() else role}" for n, role in enumerate(roles)], fontsize=8
        )
        axis.set_yticks(layers)
        axis.set_xlabel("layer and its role", fontsize=9)
        axis.set_ylabel("layer whose set is shared", fontsize=9)
        axis.set_title(f"{claim.partition(',')[0].removeprefix('In ')}: |Si and Sj| / |Sj|", fontsize=9)
        figure.colorbar(picture, ax=axis, shrink=0.7)
    figure.suptitle("a ring marks each layer's source", fontsize=8, color="0.35")
    figure.savefig(path, dpi=110, format="png")
