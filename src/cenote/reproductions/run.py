"""Runs a reproduction: times it, tells measured from expected, and keeps the outcome."""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cenote.catalog import SYSTEMS, find
from cenote.files import write_all
from cenote.reproductions.base import Finding, Reproduction, Settings, Verdict
from cenote.reproductions.evidence import evidence_page
from cenote.reproductions.figure import draw_findings

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ReproductionResult:
    """What came out of :func:`reproduce`.

    Attributes:
        slug: the system.
        claim: the paper's central claim.
        findings: every claim tested, the central one first.
        seeds: seeds of the statistical claims.
        quick: whether this was the small version.
        seconds: wall time of the whole run.
        skipped: data sets that were not there, and whose findings are therefore missing.
        figure: draws the findings to a PNG file.
    """

    slug: str
    claim: str
    findings: tuple[Finding, ...]
    seeds: tuple[int, ...]
    quick: bool
    seconds: float
    skipped: tuple[str, ...] = ()
    figure: Callable[[list[Finding], Path], None] = field(default=draw_findings, repr=False, compare=False)

    @property
    def verdict(self) -> Verdict:
        """Verdict of the central finding."""
        return self.findings[0].verdict

    def records(self) -> list[dict[str, Any]]:
        """The objects of ``results.json``, one a finding; numbers that are not finite become ``None``."""
        return [
            {
                "slug": self.slug,
                "claim": finding.claim,
                "expected": finding.expected,
                "paper": finding.paper,
                "measured": _finite(finding.measured),
                "spread": _finite(finding.spread),
                "values": [_finite(value) for value in finding.values],
                "unit": finding.unit,
                "seeds": len(finding.values),
                "verdict": finding.verdict,
                "seconds": round(self.seconds, 3),
                "note": finding.note,
                "quick": self.quick,
            }
            for finding in self.findings
        ]

    def frame(self) -> pd.DataFrame:
        """A table with one row a finding."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def plot(self, path: str | Path = "figure.png") -> Path:
        """Draw the findings to a PNG file; ``ImportError`` naming the extra where the plotting library is missing."""
        self.figure(list(self.findings), Path(path))
        return Path(path)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``figure.png`` (where figures can be drawn), ``evidence.md`` and ``results.json`` to a folder."""
        contents: dict[str, bytes | str] = {}
        try:
            with tempfile.TemporaryDirectory() as scratch:
                contents["figure.png"] = self.plot(Path(scratch) / "figure.png").read_bytes()
        except ImportError:
            pass  # the numbers are worth keeping without their picture
        contents["evidence.md"] = evidence_page(self, "figure.png" if contents else None)
        contents["results.json"] = json.dumps(self.records(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_all(folder, contents)


def available() -> list[str]:
    """Slugs of the systems that have a reproduction."""
    package = importlib.import_module("cenote.reproductions")
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return [system.slug for system in SYSTEMS if system.slug.replace("-", "_") in files]


def load_reproduction(slug: str) -> Reproduction:
    """The reproduction of a system; ``ValueError`` for an unknown slug (nearest named) or one that has none yet."""
    module = f"cenote.reproductions.{find(slug).slug.replace('-', '_')}"
    try:
        reproduction = importlib.import_module(module).REPRODUCTION
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        ready = ", ".join(available()) or "none so far"
        raise ValueError(f"the reproduction of {slug} is planned and not there yet; ready: {ready}") from None
    if reproduction.slug != slug:
        raise ValueError(f"{module} says it reproduces {reproduction.slug!r}, expected {slug!r}")
    return reproduction


def reproduce(
    slug: str,
    quick: bool = True,
    out: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    data_dir: str | Path | None = None,
    verbose: bool | Literal["progress"] = True,
) -> ReproductionResult:
    """Run a paper's central claim on this machine.

    Args:
        slug: the system, as ``cenote list`` names it.
        quick: the small version, about a minute; otherwise the full one.
        out: folder for ``results.json``, ``evidence.md`` and ``figure.png``; ``None`` writes nothing.
        seeds: one run of every statistical claim for each.
        data_dir: folder with the larger data sets; by default the environment variable ``CENOTE_DATA``, and
            without it the findings that need them are left out and named.
        verbose: print progress (standard error) and the table of measured against expected (standard output), or
            ``"progress"`` alone.

    Returns:
        The findings; ``.verdict`` is that of the central one and may be negative.

    Raises:
        ValueError: unknown slug, no reproduction yet, no seeds, or nothing that can be measured without the data.
        FileNotFoundError: the data folder does not exist.
    """
    if not seeds:
        raise ValueError("at least one seed is needed, got none")
    data = _data_folder(data_dir)
    reproduction = load_reproduction(slug)
    skipped = tuple(name for name in reproduction.needs if data is None or not (data / name).exists())
    start = time.perf_counter()
    progress = _stopwatch(start) if verbose else lambda line: None
    findings = tuple(reproduction.run(Settings(quick, tuple(seeds), data, progress)))
    seconds = time.perf_counter() - start
    if not findings:
        missing = f"; missing data: {', '.join(skipped)} (set CENOTE_DATA or --data)" if skipped else ""
        raise ValueError(f"{slug}: nothing could be measured{missing}")
    for finding in findings:
        if not finding.values or len(finding.values) != len(finding.passed):
            raise ValueError(f"{slug}: a finding needs values and as many judgements, got {finding}")
    figure = reproduction.figure or draw_findings
    result = ReproductionResult(
        reproduction.slug, reproduction.claim, findings, tuple(seeds), quick, seconds, skipped, figure
    )
    written = result.save(out) if out is not None else []
    if verbose is True:
        print_result(result)
        if written:
            print(f"written: {', '.join(str(path) for path in written)}")
            if not any(path.suffix == ".png" for path in written):
                print("no figure: it needs matplotlib, pip install matplotlib")
    return result


def print_result(result: ReproductionResult) -> None:
    """Measured against expected, with the spread over seeds and the verdict, as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    colour = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}
    table = Table(title=f"{result.slug}: {result.claim}", title_justify="left", show_lines=True)
    table.add_column("claim", ratio=3)
    table.add_column("paper", ratio=1)
    table.add_column("expected", ratio=1)
    table.add_column("measured", ratio=1)
    table.add_column("verdict", no_wrap=True)
    for finding in result.findings:
        runs = f"\nspread {finding.spread:.3g} over {len(finding.values)} seeds" if len(finding.values) > 1 else ""
        measured = f"{finding.measured:.4g} {finding.unit}".strip() + runs
        verdict = f"[{colour[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(*(_plain(cell) for cell in (finding.claim, finding.paper, finding.expected, measured)), verdict)
    console = Console()
    console.print(table)
    for name in result.skipped:
        console.print(f"left out: what needs the data set {name}", markup=False)
    size = "quick" if result.quick else "full"
    console.print(f"{result.slug} {result.verdict} ({size} run, {result.seconds:.1f} s)", highlight=False, markup=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _data_folder(data_dir: str | Path | None) -> Path | None:
    folder = data_dir or os.environ.get("CENOTE_DATA")
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    return Path(folder)


def _stopwatch(start: float) -> Callable[[str], None]:
    return lambda line: print(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr, flush=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
