"""The page ``docs/evidence/<slug>.md``: what a paper claims, what was measured here, and the verdict."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from cenote.catalog import find

if TYPE_CHECKING:
    from cenote.reproductions.base import Finding
    from cenote.reproductions.run import ReproductionResult


def evidence_page(result: ReproductionResult, figure: str | None = None) -> str:
    """The page as Markdown; ``figure`` is the picture's address relative to it."""
    system = find(result.slug)
    size = "quick" if result.quick else "full"
    lines = [
        f"# {result.slug}",
        "",
        f"[{system.title}]({system.url}), {system.year}. {system.purpose}",
        "",
        f"**Claim.** {result.claim}",
        "",
        f"**Verdict: {result.verdict}.**",
        "",
        "| claim | paper | expected | measured | spread | runs | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(finding) for finding in result.findings),
    ]
    if figure:
        lines += ["", f"![Measured values of every claim]({figure})"]
    notes = [f"- {finding.claim} {finding.note}" for finding in result.findings if finding.note]
    if notes:
        lines += ["", "## Notes", "", *notes]
    if result.skipped:
        lines += ["", f"Left out, because the data was not there: {', '.join(result.skipped)}."]
    lines += [
        "",
        "The spread is the largest minus the smallest value over the runs. A claim holds when every run satisfies it, "
        "does not hold when none does, and is inconclusive otherwise. "
        f"Run it with `cenote reproduce {result.slug} --{size}`; this took {result.seconds:.0f} s ({_machine()}).",
    ]
    return "\n".join(lines) + "\n"


def _row(finding: Finding) -> str:
    several = len(finding.values) > 1
    cells = (
        finding.claim,
        finding.paper or "-",
        finding.expected,
        f"{finding.measured:.4g} {finding.unit}".strip(),
        f"{finding.spread:.3g}" if several else "-",
        str(len(finding.values)),
        finding.verdict,
    )
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _machine() -> str:
    try:
        torch = f", torch {version('torch').partition('+')[0]}"
    except PackageNotFoundError:
        torch = ""
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}{torch}"
    )
