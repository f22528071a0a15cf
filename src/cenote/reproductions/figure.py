"""The figure of a reproduction that brings none of its own: one strip a finding, one dot a seed."""

from __future__ import annotations

import textwrap
from pathlib import Path

from cenote.reproductions.base import Finding

GOOD, BAD = "#2a7f62", "#b3402e"


def draw_findings(findings: list[Finding], path: Path) -> None:
    """Draw every value of every finding to a PNG file, coloured by whether it satisfies the claim.

    Findings of a single value are left to the table, unless there are no others.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    findings = [finding for finding in findings if len(finding.values) > 1] or findings
    figure = Figure(figsize=(8, 0.6 + 1.15 * len(findings)), layout="constrained")
    axes = figure.subplots(len(findings), 1, squeeze=False)[:, 0]
    for axis, finding in zip(axes, findings, strict=True):
        colours = [GOOD if passed else BAD for passed in finding.passed]
        axis.scatter(finding.values, [0] * len(finding.values), c=colours, s=45, zorder=3)
        axis.axvline(finding.measured, color="0.7", linewidth=1)
        axis.set_yticks([])
        axis.margins(x=0.3)
        axis.spines[["left", "right", "top"]].set_visible(False)
        axis.set_title("\n".join(textwrap.wrap(_plain(finding.claim), 95)), loc="left", fontsize=9)
        axis.set_xlabel(_plain(f"{finding.unit or 'value'}   (expected: {finding.expected})"), fontsize=8)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=110, format="png")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # a dollar sign would start a formula
