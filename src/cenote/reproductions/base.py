"""What a reproduction is: a paper's claim, run on one machine, with a verdict that may be negative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

Verdict = Literal["holds", "does not hold", "inconclusive"]


@dataclass(frozen=True)
class Settings:
    """How much to run.

    Attributes:
        quick: the small version (under a minute); the full one takes minutes.
        seeds: one run of every statistical claim for each.
        data_dir: folder with the larger data sets, or ``None``; findings that need it are then left out, and
            the result names the data sets that were missing.
        progress: called with one line of text as the work goes on.
    """

    quick: bool = True
    seeds: Sequence[int] = (0, 1, 2)
    data_dir: Path | None = None
    progress: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Finding:
    """One claim and what came out.

    Attributes:
        claim: the statement under test, in one sentence.
        expected: what the specification or paper says, as text ("at least 5 points", "1e-5").
        paper: the paper's own number where it has one, as text.
        values: what was measured, one value a seed (one value for a deterministic claim).
        passed: whether each value satisfies the claim.
        unit: unit of the values ("points", "x", "max abs difference").
        note: anything a reader must know to judge it.
    """

    claim: str
    expected: str
    values: tuple[float, ...]
    passed: tuple[bool, ...]
    paper: str = ""
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """All seeds agree that it holds, all that it does not, or they disagree."""
        if all(self.passed):
            return "holds"
        return "inconclusive" if any(self.passed) else "does not hold"

    @property
    def measured(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Largest minus smallest value over seeds."""
        return max(self.values) - min(self.values)


def finding(
    claim: str,
    expected: str,
    values: Sequence[float] | float,
    rule: Callable[[float], bool],
    *,
    paper: str = "",
    unit: str = "",
    note: str = "",
) -> Finding:
    """A finding whose claim holds for a value exactly when ``rule(value)`` is true."""
    numbers = tuple(float(v) for v in values) if isinstance(values, Sequence) else (float(values),)
    return Finding(claim, expected, numbers, tuple(bool(rule(v)) for v in numbers), paper, unit, note)


def at_most(claim: str, value: float, bound: float, unit: str = "max abs difference", note: str = "") -> Finding:
    """A finding of one value that holds up to ``bound``."""
    return finding(claim, f"at most {bound:.3g}", value, lambda v: v <= bound, unit=unit, note=note)


@dataclass(frozen=True)
class Reproduction:
    """What a file ``reproductions/<slug>.py`` offers as ``REPRODUCTION``.

    Attributes:
        slug: the specification.
        claim: the paper's central claim in one sentence.
        run: does the work and returns the findings, the central one first.
        figure: draws the findings to a PNG file; ``None`` for one strip of dots a finding.
        needs: data sets, as names under :attr:`Settings.data_dir`, without which some findings are left out.
    """

    slug: str
    claim: str
    run: Callable[[Settings], list[Finding]]
    figure: Callable[[list[Finding], Path], None] | None = None
    needs: tuple[str, ...] = field(default=())
